"""Started by test_vllm_engine.py, alone or under torchrun: runs the engine on one rank and writes what it saw as JSON.

argv: model folder, output folder, tensor_parallel, 1 for seed_per_request.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fec.rollout.engine import Sampling, check_groups, true_vocab_size
from megatron_fec.rollout.vllm_engine import VllmEngine
from megatron_fec.types import Prompt, SampleGroup

GROUP, TEMPERATURE = 3, 0.7
TOP_P, TOP_K = 0.6, 8


def main(model_dir: str, out_dir: str, tensor_parallel: int, seed_per_request: bool) -> None:
    rank, seen = int(os.environ.get("RANK", "0")), {}
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = ["0+1=", "1+1=", "2+1=", "3+1=", "a long prompt fills a block of the prefix cache, " * 4]
    prompts = [_prompt(tokenizer, i, text) for i, text in enumerate(texts)] + [
        _prompt(tokenizer, 0, texts[0])
    ]
    torch.manual_seed(1)
    before = _global_state()

    start = time.perf_counter()
    engine = _engine(model_dir, tensor_parallel, seed_per_request)
    seen["seconds_start"] = time.perf_counter() - start
    sampling = Sampling(group_size=GROUP, max_response_tokens=200, temperature=TEMPERATURE, seed=11)
    seen["before_refit"] = _error_of(lambda: engine.generate(prompts, sampling))

    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:  # what a Megatron export of a tied model yields
        weights.pop("lm_head.weight", None)
    ambient: dict[str, object] = {}
    for version, scale in ((4, 1.0), (5, 1.1)):
        for name in weights:  # norms too: every kind of parameter must arrive
            weights[name] = weights[name] * scale
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
        start = time.perf_counter()
        engine.refit(_probed(weights, ambient), version=version)
        seen["seconds_refit"] = time.perf_counter() - start
        start = time.perf_counter()
        groups = engine.generate(prompts, sampling)
        seen["seconds_generate"] = time.perf_counter() - start
        check_groups(groups, weight_version=version, group_size=GROUP)
        seen[f"error_{version}"] = max(_errors(model, groups, len(tokenizer)))
    cut = engine.generate(prompts, replace(sampling, top_p=TOP_P, top_k=TOP_K))
    seen["error_truncated"] = max(_errors(model, cut, len(tokenizer), top_p=TOP_P, top_k=TOP_K))
    seen["is_truncated"] = cut != groups
    engine.free(keep_weights=True)
    again = engine.generate(prompts, sampling)
    seen["repeats"] = again == groups
    engine.free(keep_weights=False)
    seen["after_free"] = _error_of(lambda: engine.generate(prompts, sampling))
    seen["ambient"] = ambient
    seen["state_kept"] = _global_state() == before
    seen["threads_settable"] = torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"
    seen["eos"], seen["true_vocabulary"] = tokenizer.eos_token_id, true_vocab_size(tokenizer)
    seen["order"] = [g.prompt.prompt_id for g in groups] == [p.prompt_id for p in prompts]
    seen["samples"] = [[_plain(s) for s in g.samples] for g in groups]
    seen["failed_refit"] = _error_of(lambda: engine.refit(_broken(weights), version=6))
    seen["after_failed_refit"] = _error_of(lambda: engine.generate(prompts, sampling))
    seen["indivisible"] = _error_of(lambda: _engine(model_dir, 3, True))
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    seen["environment"] = _error_of(lambda: _engine(model_dir, 1, True))
    Path(out_dir, f"rank{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.barrier()


def _engine(model_dir: str, tensor_parallel: int, seed_per_request: bool) -> VllmEngine:
    return VllmEngine(
        model_dir=model_dir,
        vocab_size=true_vocab_size(AutoTokenizer.from_pretrained(model_dir)),
        dtype="float32",
        tensor_parallel=tensor_parallel,
        max_model_len=512,
        gpu_memory_utilization=0.5,
        seed_per_request=seed_per_request,
    )


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def _broken(weights):
    yield from list(weights.items())[:5]
    raise RuntimeError("stream broke")


def _prompt(tokenizer, i: int, text: str) -> Prompt:
    return Prompt(
        prompt_id=i, text=text, token_ids=tuple(tokenizer(text)["input_ids"]), answer="", verifier=""
    )


def _plain(sample) -> dict[str, object]:
    return {"token_ids": sample.token_ids, "text": sample.text, "is_truncated": sample.is_truncated}


def _probed(weights, ambient):
    """The stream, noting in which global state the engine iterates it."""
    for name, tensor in weights.items():
        ambient["inference_mode"] = torch.is_inference_mode_enabled()
        ambient["dtype"] = str(torch.get_default_dtype())
        ambient["device"] = str(torch.get_default_device())
        ambient["grad"] = torch.is_grad_enabled()
        yield name, tensor


@torch.no_grad()
def _errors(model, groups: list[SampleGroup], vocabulary: int, *, top_p: float = 1.0, top_k: int = 0):
    """Distance of each log-prob from a transformers forward, at the temperature, over the true vocabulary.

    After top-k and then top-p where they are given; a token that these leave out is infinitely far.
    """
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
            logits = model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1, :vocabulary]
            expected = (logits / TEMPERATURE).log_softmax(-1)
            for row in expected if top_k else ():
                order = row.argsort(descending=True)
                above = row[order].exp() / row[order[:top_k]].exp().sum()
                count = min(top_k, int((above.cumsum(0) - above < top_p).sum()))
                row[order[count:]] = -torch.inf
                row -= row.logsumexp(0)
            response = torch.tensor(sample.token_ids)
            expected = expected.gather(1, response[:, None])[:, 0]
            yield (torch.tensor(sample.logprobs) - expected).abs().max().item()


def _global_state() -> tuple:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # pyright: ignore[reportArgumentType, reportIndexIssue]
        str(torch.get_default_dtype()),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
