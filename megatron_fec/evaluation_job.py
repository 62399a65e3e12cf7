"""One evaluation from its settings to its results; every rank runs it, rank 0 writes.

Problems are sampled in batches of whole problems, always the same ones, and each response has a seed of its own that
depends on the problem alone. So an evaluation that was killed goes on with its first unwritten batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from omegaconf import OmegaConf
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from megatron_fec.config import ConfigError, OptimizerConfig, PolicyConfig
from megatron_fec.engines import checkpoint_weights, native_engine, vllm_engine, weight_files
from megatron_fec.evaluation_config import BenchmarkConfig, EvaluationConfig
from megatron_fec.evaluation_files import (
    append_generations,
    check_made_with,
    digest_of_prompts,
    digest_of_weights,
    generations_of,
    generations_path,
    keep_generations,
    read_generations,
)
from megatron_fec.evaluation_results import BenchmarkResult, result_of, terminal_table, write_results
from megatron_fec.policy.device import backend, device, prepare_device
from megatron_fec.policy.model import load_hf_config
from megatron_fec.policy.parallel import (
    COLLECTIVE_DEADLINE,
    ParallelLayout,
    check_model_sizes,
    initialize_parallel,
)
from megatron_fec.policy.step import build_policy
from megatron_fec.preflight import (
    check_heads,
    check_length,
    check_vllm,
    check_writable,
    load_tokenizer,
    local_model,
    on_all_ranks,
)
from megatron_fec.rollout.engine import Engine, Sampling, check_groups, request_seeds, true_vocab_size
from megatron_fec.seeds import derive_seed
from megatron_fec.tasks.prompts import load_prompts
from megatron_fec.tasks.verifier import Verdict, Verifier
from megatron_fec.types import Prompt, SampleGroup

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark, loaded."""

    name: str
    settings: BenchmarkConfig
    prompts: tuple[Prompt, ...]
    num_too_long: int  # left out
    seed: int
    batch_size: int  # problems that are sampled together

    @property
    def seeds(self) -> list[int]:
        """Of the first response to each problem; the next has the next number."""
        return request_seeds(self.prompts, self.seed)


def evaluate(config: EvaluationConfig) -> list[BenchmarkResult]:
    """Samples and scores what is missing, then leaves results.json and results.md in the output folder."""
    disable_progress_bar()
    layout = _start_world(config)
    folder = Path(config.output_dir)
    model_dir, tokenizer, benchmarks = _prepare(config, folder)
    done = _on_rank_0(lambda: _resume(config, folder, model_dir, benchmarks))
    _note(
        f"{config.model.path} on {device().type}, processes: {dist.get_world_size()}, engine: {config.rollout.engine}"
    )
    results: list[BenchmarkResult] = []
    verifier = Verifier(workers=1, timeout=config.verifier_timeout)
    try:
        engine: Engine | None = None
        for benchmark in benchmarks:
            if done[benchmark.name] < len(benchmark.prompts):
                engine = engine or _engine(config, layout, model_dir, tokenizer)
                _sample(config, benchmark, engine, verifier, start=done[benchmark.name])
            results.append(_on_rank_0(lambda one=benchmark: _result(folder, one)))
            _on_rank_0(lambda: _checked_write(lambda: write_results(folder, config, results)))
    finally:
        verifier.close()
    if dist.get_rank() == 0:
        Console(highlight=False).print(terminal_table(results))
    _note(f"results     {folder / 'results.json'}, {folder / 'results.md'}")
    dist.barrier()
    return results


def _start_world(config: EvaluationConfig) -> ParallelLayout | None:
    """Process groups; those of Megatron for the native engine only."""
    if config.rollout.engine == "native":
        return initialize_parallel(_policy_config(config), seed=config.rollout.seed)
    prepare_device()
    if not dist.is_initialized():
        dist.init_process_group(backend(), timeout=COLLECTIVE_DEADLINE)
    return None


def _prepare(config: EvaluationConfig, folder: Path) -> tuple[Path, Any, list[Benchmark]]:
    """Model folder, tokenizer and prompts; what is wrong with them is found before a weight is loaded."""
    if config.rollout.engine == "vllm":
        on_all_ranks(lambda: check_vllm(config.rollout.tensor_parallel))
    _on_rank_0(lambda: check_writable(folder, setting="output_dir"))
    model_dir = on_all_ranks(lambda: local_model(config.model, folder, seed=config.rollout.seed))
    tokenizer = on_all_ranks(lambda: _checked_tokenizer(config, model_dir))
    return model_dir, tokenizer, on_all_ranks(lambda: _benchmarks(config, tokenizer))


def _checked_tokenizer(config: EvaluationConfig, model_dir: Path) -> Any:
    hf_config = load_hf_config(str(model_dir))
    rollout = config.rollout
    if rollout.engine == "vllm":
        check_heads(rollout.tensor_parallel, hf_config)
    else:
        check_model_sizes(hf_config, _policy_config(config))
    check_length(rollout.max_prompt_tokens, rollout.max_response_tokens, hf_config)
    missing = [path.name for path in weight_files(model_dir) if not path.is_file()]
    if missing or not weight_files(model_dir):
        raise ConfigError(
            f"model.path={config.model.path} holds no {missing[0] if missing else '*.safetensors file'}. "
            "Convert the checkpoint first, or copy the rest of it."
        )
    return load_tokenizer(config.model, model_dir, hf_config)


def _benchmarks(config: EvaluationConfig, tokenizer: Any) -> list[Benchmark]:
    loaded = []
    for name, settings in config.chosen.items():
        found = load_prompts(
            settings.source,
            setting=f"benchmarks.{name}.source",
            tokenizer=tokenizer,
            prompt_column=settings.prompt_column,
            answer_column=settings.answer_column,
            answer_after=settings.answer_after,
            prompt_style=settings.prompt_style,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
        )
        loaded.append(
            Benchmark(
                name=name,
                settings=settings,
                prompts=found.prompts,
                num_too_long=found.num_too_long,
                seed=derive_seed(config.rollout.seed, f"evaluation:{name}"),
                batch_size=max(1, config.rollout.responses_per_batch // settings.samples),
            )
        )
    return loaded


def _resume(
    config: EvaluationConfig, folder: Path, model_dir: Path, benchmarks: Sequence[Benchmark]
) -> dict[str, int]:
    """Problems of each benchmark that an earlier start has finished; their last, broken batch is cut off."""
    rollout = asdict(config.rollout)
    for unseen in ("tensor_parallel", "gpu_memory_utilization"):  # another layout rounds otherwise, no more
        del rollout[unseen]
    made_with = {
        "model": {"path": config.model.path, "digest": digest_of_weights(model_dir)},
        "policy": {"precision": config.policy.precision},
        "rollout": rollout,
        "verifier_timeout": config.verifier_timeout,
        "benchmarks": {
            one.name: {
                "samples": one.settings.samples,
                "problems": len(one.prompts),
                "prompts": digest_of_prompts(one.prompts),
            }
            for one in benchmarks
        },
    }
    _checked_write(lambda: check_made_with(folder, made_with))
    done = {}
    for one in benchmarks:
        path, samples = generations_path(folder, one.name), one.settings.samples
        found = len(read_generations(path, one.prompts, samples=samples, seeds=one.seeds)) // samples
        done[one.name] = found if found == len(one.prompts) else found // one.batch_size * one.batch_size
        _checked_write(lambda path=path, lines=done[one.name] * samples: keep_generations(path, lines))
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    _checked_write(lambda: (folder / "config.yaml").write_text(text))
    return done


def _engine(
    config: EvaluationConfig, layout: ParallelLayout | None, model_dir: Path, tokenizer: Any
) -> Engine:
    """The engine with the model's weights in it: vLLM by itself, the native one around a policy."""
    rollout = config.rollout
    if layout is None:
        engine = vllm_engine(
            model_dir,
            tokenizer,
            precision=config.policy.precision,
            tensor_parallel=rollout.tensor_parallel,
            max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            seed_per_request=True,  # a seed per response is what resuming relies on
        )
        engine.refit(checkpoint_weights(model_dir), version=0)
        return engine
    policy = build_policy(
        str(model_dir),
        _policy_config(config),
        OptimizerConfig(),
        layout=layout,
        temperature=rollout.temperature,
        total_steps=1,
        vocab_size=true_vocab_size(tokenizer),
    )
    engine = native_engine(policy, tokenizer)
    engine.refit(iter(()), version=0)
    return engine


def _policy_config(config: EvaluationConfig) -> PolicyConfig:
    return PolicyConfig(
        tensor_parallel=config.policy.tensor_parallel,
        pipeline_parallel=config.policy.pipeline_parallel,
        # Switched off while sampling; a mixture of experts asks for it where it is built.
        sequence_parallel=config.policy.tensor_parallel > 1,
        precision=config.policy.precision,
        distributed_optimizer=False,
    )


def _sample(
    config: EvaluationConfig, benchmark: Benchmark, engine: Engine, verifier: Verifier, *, start: int
) -> None:
    """Samples, scores and writes the problems from `start` on, batch after batch."""
    samples, path = benchmark.settings.samples, generations_path(Path(config.output_dir), benchmark.name)
    sampling = Sampling(
        group_size=samples,
        max_response_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        seed=benchmark.seed,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
    )
    for first in range(start, len(benchmark.prompts), benchmark.batch_size):
        began = time.monotonic()
        prompts = benchmark.prompts[first : first + benchmark.batch_size]
        groups = engine.generate(prompts, sampling)
        check_groups(groups, weight_version=0, group_size=samples)
        sampled = time.monotonic()
        verdicts = _scored(verifier, groups)
        lines = generations_of(groups, verdicts, request_seeds(prompts, benchmark.seed))
        _on_rank_0(lambda lines=lines: _checked_write(lambda: append_generations(path, lines)))
        right = sum(line.reward > 0 for line in lines) / len(lines)
        speed = sum(line.tokens for line in lines) / (sampled - began)
        _note(
            f"{benchmark.name}  {first + len(prompts)}/{len(benchmark.prompts)} problems  "
            f"{right:.3f} of this batch right  {speed:.0f} tokens/s"
        )


def _scored(verifier: Verifier, groups: Sequence[SampleGroup]) -> list[list[Verdict]]:
    """A verdict for each sample, on every rank; each rank scores every world-size-th group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    own = [[future.result() for future in group] for group in verifier.start_step(groups[rank::world])]
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, own)
    return [shares[i % world][i // world] for i in range(len(groups))]


def _result(folder: Path, benchmark: Benchmark) -> BenchmarkResult:
    """From the file, so that an evaluation in one go and in pieces give one and the same."""
    found = read_generations(
        generations_path(folder, benchmark.name),
        benchmark.prompts,
        samples=benchmark.settings.samples,
        seeds=benchmark.seeds,
    )
    return result_of(
        benchmark.name,
        found,
        samples=benchmark.settings.samples,
        ks=benchmark.settings.ks,
        num_too_long=benchmark.num_too_long,
    )


def _on_rank_0(work: Callable[[], Result]) -> Result:
    """What work returns on rank 0, on every rank; so does its ConfigError."""
    box = [on_all_ranks(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def _checked_write(write: Callable[[], Result]) -> Result:
    try:
        return write()
    except OSError as error:
        raise ConfigError(
            f"output_dir: {error.filename} cannot be written: {error.strerror}. Make room, or choose another folder; "
            "what is there already is kept."
        ) from error


def _note(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
