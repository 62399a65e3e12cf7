"""The chunked LM head against the float64 oracle and against token_stats on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vocab_reference import vocab_reference

from megatron_fec.vocab_parallel import chunked_head, torch_kernel, triton_kernel
from megatron_fec.vocab_parallel.chunked_head import chunked_head_token_stats
from megatron_fec.vocab_parallel.token_stats import token_stats

TOKENS, HIDDEN, VOCAB, PADDED = 12, 6, 37, 40
VALUES = ("logprobs", "entropy", "sum_p2", "baseline", "alignment")


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [12, 6], weight [40, 6] with padding rows that would win every maximum, labels [12]."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).abs() + 0.5
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    weight[VOCAB:] = 50.0
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[0], labels[1], labels[5] = 0, VOCAB - 1, -100
    return hidden.to(dtype), weight.to(dtype), labels


def upstream() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    both = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    return both[0], both[1]


def run_head(rank: int, world_size: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    """Values, this rank's part of the hidden gradient, and its rows of the weight gradient."""
    hidden, weight, labels = make_inputs(dtype)
    hidden.requires_grad_()
    weight = weight.chunk(world_size)[rank].clone().requires_grad_()
    group = dist.group.WORLD if world_size > 1 else None
    stats = chunked_head_token_stats(
        hidden, weight, labels, group=group, vocab_size=VOCAB, second_moments=True, **options
    )
    gl, gh = upstream()
    loss = (stats.logprobs * gl + stats.entropy * gh).sum()
    grads = dict(zip(("hidden", "weight"), torch.autograd.grad(loss, (hidden, weight)), strict=True))
    return {name: getattr(stats, name).detach() for name in VALUES} | grads


def run_sharded(world_size: int, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    if world_size == 1:
        return run_head(0, 1, dtype, options)
    results = run_on_ranks(world_size, run_head, world_size, dtype, options)
    hidden = torch.stack([result["hidden"] for result in results]).sum(0)
    return results[0] | {"hidden": hidden, "weight": torch.cat([result["weight"] for result in results])}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 12, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_oracle(world_size: int, chunk_tokens: int, temperature: float) -> None:
    hidden, weight, labels = make_inputs(torch.float64)
    result = run_sharded(world_size, torch.float64, chunk_tokens=chunk_tokens, temperature=temperature)
    gl, gh = upstream()
    reference = vocab_reference(
        hidden @ weight.t(),
        labels,
        vocab_size=VOCAB,
        grad_logprobs=gl,
        grad_entropy=gh,
        temperature=temperature,
    )
    for name in VALUES:
        torch.testing.assert_close(result[name], getattr(reference, name), rtol=1e-12, atol=1e-12)
    logits_gradient = reference.logprobs_gradient + reference.entropy_gradient
    torch.testing.assert_close(result["hidden"], logits_gradient @ weight, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result["weight"], logits_gradient.t() @ hidden, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_whole_logits_give_the_same_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    chunked = run_sharded(1, dtype, chunk_tokens=3)
    hidden, weight, labels = make_inputs(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    stats = token_stats(hidden @ weight.t(), labels, vocab_size=VOCAB, second_moments=True)
    gl, gh = upstream()
    grads = torch.autograd.grad((stats.logprobs * gl + stats.entropy * gh).sum(), (hidden, weight))
    for name in VALUES:
        torch.testing.assert_close(
            chunked[name], getattr(stats, name).detach(), rtol=tolerance, atol=tolerance
        )
    for gradient, expected in zip((chunked["hidden"], chunked["weight"]), grads, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()


def test_triton_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_sharded(2, torch.float32, chunk_tokens=3)
    monkeypatch.setattr(chunked_head, "kernel_for", lambda hidden: triton_kernel)
    for name, value in run_sharded(2, torch.float32, chunk_tokens=3).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=5e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("chunk_tokens", "columns"), [(1, 16), (8, 64), (32, 256), (64, 512)])
def test_only_one_chunk_of_logits_exists(
    chunk_tokens: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_kernel.SCRATCH_BYTES, "cpu", 512)
    hidden, weight = torch.randn(64, 2, requires_grad=True), torch.randn(512, 2, requires_grad=True)
    labels = torch.zeros(64, dtype=torch.int64)
    with LargestTensor() as largest:
        stats = chunked_head_token_stats(hidden, weight, labels, chunk_tokens=chunk_tokens)
        (stats.logprobs + stats.entropy).sum().backward()
    assert largest.numel == 64 * columns  # the weight has 512 * 2


def test_backward_may_run_twice() -> None:
    hidden, weight, labels = make_inputs(torch.float32)
    stats = chunked_head_token_stats(
        hidden.requires_grad_(), weight, labels, vocab_size=VOCAB, chunk_tokens=4
    )
    loss = (stats.logprobs + stats.entropy).sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second) and first.any()


def test_no_tokens() -> None:
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    stats = chunked_head_token_stats(hidden, weight, torch.zeros(0, dtype=torch.int64), chunk_tokens=4)
    (stats.logprobs + stats.entropy).sum().backward()
    assert stats.logprobs.shape == (0,) and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(12, 6, dtype=torch.int64)}, r"hidden\.dtype=torch\.int64 must be bf16"),
        (
            {"weight": torch.zeros(40, 6, dtype=torch.float64)},
            r"weight\.dtype=torch\.float64 must be hidden's",
        ),
        ({"weight": torch.zeros(40, 5)}, r"must be \[T, H\] and \[V_local, H\], not \(12, 6\) and \(40, 5\)"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, r"labels\.shape=\(11,\) must be \(12,\)"),
        ({"labels": torch.full((12,), 37)}, r"labels\[0\]=37 on rank 0 of 1 must be in \[0, vocab_size=37\)"),
        ({"chunk_tokens": 0}, r"chunk_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be finite"),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    hidden, weight, labels = make_inputs(torch.float32)
    inputs: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels}
    settings: dict[str, Any] = {"vocab_size": VOCAB, "chunk_tokens": 4}
    with pytest.raises(ValueError, match=message):
        chunked_head_token_stats(**(inputs | settings | changed))


def errors_of_a_rank(rank: int) -> list[str]:
    messages = []
    for rows, label in ((20 - rank, 0), (20, 40 * rank)):
        with pytest.raises(ValueError) as caught:
            chunked_head_token_stats(
                torch.ones(8, 3),
                torch.ones(rows, 3),
                torch.full((8,), label),
                group=dist.group.WORLD,
                chunk_tokens=2,
            )
        messages.append(str(caught.value))
    return messages


def test_every_rank_raises_the_same_error() -> None:
    first, second = run_on_ranks(2, errors_of_a_rank, deadline=20.0)
    assert first == second
    assert "logits.shape[1]=[20, 19] by rank must be one width" in first[0]
    assert "labels[0]=40 on rank 1 of 2 must be in [0, vocab_size=40)" in first[1]


def test_a_frozen_weight_or_input_gets_no_gradient() -> None:
    hidden, weight, labels = make_inputs(torch.float32)
    both = run_head(0, 1, torch.float32, {"chunk_tokens": 5})
    for chosen, name in ((hidden, "hidden"), (weight, "weight")):
        chosen.requires_grad_()
        stats = chunked_head_token_stats(hidden, weight, labels, vocab_size=VOCAB, chunk_tokens=5)
        gl, gh = upstream()
        (gradient,) = torch.autograd.grad((stats.logprobs * gl + stats.entropy * gh).sum(), chosen)
        assert torch.equal(gradient, both[name])
        chosen.requires_grad_(False)
