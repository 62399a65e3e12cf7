"""The Triton kernel on a real GPU against the float64 oracle, values and gradients; with two GPUs over NCCL.

python -m pytest tests/gpu/test_token_stats_gpu.py      # two of the tests need two GPUs
"""

from __future__ import annotations

from typing import Any

import pytest
from gpu_ranks import on_gpus

TOKENS, PADDED, VOCABULARY = 33, 8192 + 128, 8201  # more than one tile of the kernel, the last with padding
GRADIENT_TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-7}  # of the largest entry


def against_oracle(rank: int, dtype: str) -> dict[str, Any]:
    """Largest errors on this rank's shard."""
    import torch
    import torch.distributed as dist
    from vocab_reference import vocab_reference

    from megatron_fec.policy.device import device
    from megatron_fec.vocab_parallel.token_stats import kernel_for, token_stats

    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(TOKENS, PADDED, generator=generator) * 4).to(getattr(torch, dtype))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[3] = -100
    upstream = torch.randn(2, TOKENS, generator=generator)
    exact = vocab_reference(
        logits,
        labels,
        vocab_size=VOCABULARY,
        grad_logprobs=upstream[0],
        grad_entropy=upstream[1],
        temperature=0.7,
    )
    width = PADDED // dist.get_world_size()
    columns = slice(rank * width, (rank + 1) * width)
    shard = logits[:, columns].to(device()).requires_grad_()
    stats = token_stats(
        shard,
        labels.to(device()),
        group=dist.group.WORLD,
        vocab_size=VOCABULARY,
        temperature=0.7,
        second_moments=True,
    )
    grads = upstream.to(device())
    (gradient,) = torch.autograd.grad((stats.logprobs * grads[0] + stats.entropy * grads[1]).sum(), shard)
    wanted = (exact.logprobs_gradient + exact.entropy_gradient)[:, columns]
    assert stats.sum_p2 is not None and stats.baseline is not None

    def error(got: torch.Tensor, value: torch.Tensor) -> float:
        return (got.detach().double().cpu() - value).abs().max().item()

    return {
        "kernel": kernel_for(shard).__name__,
        "logprobs": error(stats.logprobs, exact.logprobs),
        "entropy": error(stats.entropy, exact.entropy),
        "sum_p2": error(stats.sum_p2, exact.sum_p2),
        "baseline": error(stats.baseline, exact.baseline),
        "gradient": error(gradient, wanted) / wanted.abs().max().item(),
        "bits": [stats.logprobs.tolist(), stats.entropy.tolist()],
    }


def check(ranks: list[dict[str, Any]], dtype: str) -> None:
    for seen in ranks:
        assert seen["kernel"].endswith("triton_kernel")
        assert max(seen[name] for name in ("logprobs", "entropy", "sum_p2", "baseline")) < 2e-5
        assert seen["gradient"] < GRADIENT_TOLERANCE[dtype]
        assert seen["bits"] == ranks[0]["bits"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
def test_one_shard(dtype: str) -> None:
    check(on_gpus(1, against_oracle, dtype), dtype)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
def test_two_shards_over_nccl(dtype: str) -> None:
    check(on_gpus(2, against_oracle, dtype), dtype)
