"""How fast the weights of the policy reach an engine: GB/s of the export, into nothing and into an engine's copy.

    python benchmarks/refit.py [--tensor-parallel 2] [--repeats 10] [--out FILE.md]   # a small model, CPU ranks
    torchrun --nproc-per-node 8 benchmarks/refit.py --config configs/qwen7b_id.yaml model.path=/models/Qwen2.5-7B [--vllm]

`stream` iterates hf_weights and drops each tensor: gathers and broadcasts, and the model's own layout undone. `load` also
copies each tensor into memory of its own, as an engine's loader does. `vllm` (--vllm) is VllmEngine.refit, engine asleep
at the start of each. `gather, by tensor` and `gather, in buckets` compare what an export would win by sending its
tensor-parallel shards in flat buckets. CPU: seconds of processor time of the slowest rank; GPU: elapsed. 1 GB is 1e9 bytes
of full tensors, which each rank sees.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the tests' ranks

from policy_bench import Subject, folder_for_model, in_turns, on_ranks, spread, subject

from megatron_fec.policy.device import device
from megatron_fec.policy.step import Policy, cores
from megatron_fec.policy.weights import hf_weights
from megatron_fec.rollout.weight_transfer import BUCKET_BYTES

MANY_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 40, "vocab_size": 512}


def stream(policy: Policy) -> int:
    """Bytes of the full tensors."""
    return sum(tensor.nbytes for _, tensor in hf_weights(policy))


def load(policy: Policy, own: dict[str, Tensor]) -> None:
    for name, tensor in hf_weights(policy):
        if name not in own:  # of the round that is not counted
            own[name] = torch.empty_like(tensor)
        own[name].copy_(tensor)


def gather_by_tensor(shards: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    for shard in shards:
        whole = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(whole, shard, group=group)


def gather_in_buckets(shards: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """The same shards, copied into flat buckets first."""
    bucket: list[Tensor] = []
    for place, shard in enumerate(shards):
        bucket.append(shard.reshape(-1))
        if sum(part.nbytes for part in bucket) >= BUCKET_BYTES or place == len(shards) - 1:
            flat = torch.cat(bucket)
            whole = [torch.empty_like(flat) for _ in range(group.size())]
            dist.all_gather(whole, flat, group=group)
            bucket = []


def works(policy: Policy, chosen: Subject, *, with_vllm: bool) -> dict[str, Callable[[], object]]:
    group = policy.layout.tensor_group
    shards = [parameter.detach() for parameter in cores(policy)[0].parameters()]
    found: dict[str, Callable[[], object]] = {
        "stream": partial(stream, policy),
        "load": partial(load, policy, {}),
    }
    if group.size() > 1:
        found |= {
            "gather, by tensor": partial(gather_by_tensor, shards, group),
            "gather, in buckets": partial(gather_in_buckets, shards, group),
        }
    if with_vllm:
        found["vllm"] = partial(_refit, policy, _vllm(chosen))
    return found


def _refit(policy: Policy, engine: Any) -> None:
    engine.free(keep_weights=False)
    engine.refit(hf_weights(policy), version=1)


def _vllm(chosen: Subject) -> Any:
    # Imported only here: vLLM is an optional extra, and importing it takes seconds.
    from megatron_fec.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        model_dir=chosen.model_dir,
        vocab_size=chosen.vocab_size,
        dtype="float32" if chosen.settings.precision == "fp32" else "bfloat16",
        tensor_parallel=chosen.settings.tensor_parallel,
        max_model_len=512,
        gpu_memory_utilization=0.3,
        seed_per_request=True,
    )


def measured(
    policy: Policy, chosen: Subject, *, repeats: int, with_vllm: bool
) -> tuple[int, dict[str, list[float]]]:
    """Bytes of the model, and the seconds of each repeat on this rank."""
    return stream(policy), in_turns(works(policy, chosen, with_vllm=with_vllm), repeats)


def report(chosen: Subject, num_bytes: int, ranks: Sequence[dict[str, list[float]]]) -> str:
    is_cpu = device().type == "cpu"
    slowest = {n: [max(values) for values in zip(*(r[n] for r in ranks), strict=True)] for n in ranks[0]}
    lines = [
        f"{chosen.name}: {num_bytes / 1e9:.4f} GB in {chosen.settings.precision}, TP {chosen.settings.tensor_parallel}, "
        f"{len(ranks)} ranks on {'CPU' if is_cpu else torch.cuda.get_device_name()}, "
        f"{len(next(iter(slowest.values())))} repeats in turns.",
        "",
        f"| way | {'processor ' if is_cpu else ''}seconds, slowest rank: median (quartiles) | GB/s |",
        "|---|---|---|",
    ]
    for name, values in slowest.items():
        middle, low, high = spread(values)
        lines.append(f"| {name} | {middle:.4f} ({low:.4f} to {high:.4f}) | {num_bytes / middle / 1e9:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, help="model and layout; default: a small model on CPU ranks")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="of the small model")
    parser.add_argument(
        "--many-small", action="store_true", help="a model of 40 layers of small tensors instead"
    )
    parser.add_argument("--vllm", action="store_true", help="also into vLLM, in these processes (GPUs)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a Markdown file that gets the result too")
    parser.add_argument("overrides", nargs="*", help="key=value, with --config")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with folder_for_model() as folder:
        sizes = MANY_SMALL if arguments.many_small else None
        chosen = subject(arguments.config, arguments.overrides, Path(folder), sizes=sizes)
        if arguments.config is None:
            layout = replace(chosen.settings, tensor_parallel=arguments.tensor_parallel)
            chosen = replace(chosen, settings=layout)
        job = partial(measured, chosen=chosen, repeats=arguments.repeats, with_vllm=arguments.vllm)
        found = on_ranks(chosen, job)
        if found is None:
            return
        text = report(chosen, found[0][0], [seconds for _, seconds in found])
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
