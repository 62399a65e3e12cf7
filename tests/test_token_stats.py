"""token_stats against the float64 oracle on 1, 2 and 4 ranks; edge cases, memory contract and errors."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor
from vocab_reference import VocabReference, vocab_reference

from megatron_fec.vocab_parallel import token_stats as token_stats_module
from megatron_fec.vocab_parallel import torch_kernel, triton_kernel
from megatron_fec.vocab_parallel.token_stats import token_stats

TOKENS, VOCAB, PADDED = 11, 37, 40
OUTPUTS = ("logprobs", "entropy", "sum_p2", "baseline", "alignment")
GRADIENTS = ("logprobs_gradient", "entropy_gradient")
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_inputs(
    dtype: torch.dtype = torch.float32, *, vocab: int = VOCAB, scale: float = 4.0
) -> tuple[Tensor, Tensor]:
    """[11, 40] logits whose padding would win every maximum; [11] labels, one of them ignored."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(TOKENS, PADDED, generator=generator) * scale
    logits[:, vocab:] = 1e4
    labels = torch.randint(vocab, (TOKENS,), generator=generator)
    labels[0], labels[1], labels[4] = 0, vocab - 1, -100
    return logits.to(dtype), labels


def make_grads(tokens: int) -> tuple[Tensor, Tensor]:
    """Upstream gradients of logprobs and entropy, [T] fp64."""
    generator = torch.Generator().manual_seed(6)
    both = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    return both[0], both[1]


def run_shard(
    rank: int, world_size: int, logits: Tensor, labels: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Outputs and this shard's gradient columns, on one rank."""
    shard = logits.chunk(world_size, 1)[rank].clone().requires_grad_()
    group = dist.group.WORLD if world_size > 1 else None
    stats = token_stats(shard, labels, group=group, **options)
    result = {name: getattr(stats, name).detach() for name in OUTPUTS if getattr(stats, name) is not None}
    for name, output, grad in zip(
        GRADIENTS, (stats.logprobs, stats.entropy), make_grads(len(labels)), strict=True
    ):
        result[name] = torch.autograd.grad(output, shard, grad.to(output.dtype), retain_graph=True)[0]
    return result


def run_sharded(world_size: int, logits: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    """Outputs, checked to be the same bits on every rank, and gradients put together from the shards."""
    if world_size == 1:
        return run_shard(0, 1, logits, labels, options)
    results = run_on_ranks(world_size, run_shard, world_size, logits, labels, options)
    for result in results[1:]:
        for name in result.keys() - set(GRADIENTS):
            assert torch.equal(result[name], results[0][name])
    return results[0] | {name: torch.cat([result[name] for result in results], 1) for name in GRADIENTS}


def make_reference(
    logits: Tensor, labels: Tensor, vocab_size: int, temperature: float = 1.0
) -> VocabReference:
    gl, gh = make_grads(len(labels))
    return vocab_reference(
        logits, labels, vocab_size=vocab_size, grad_logprobs=gl, grad_entropy=gh, temperature=temperature
    )


def assert_matches(result: dict[str, Tensor], reference: VocabReference, dtype: torch.dtype) -> None:
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (5e-7, 2e-6)
    for name in result.keys() - set(GRADIENTS):
        assert result[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(result[name].double(), getattr(reference, name), rtol=rtol, atol=atol)
    for name in GRADIENTS:
        expected = getattr(reference, name)
        assert result[name].dtype == dtype
        error = (result[name].double() - expected).abs().max()
        assert error <= GRADIENT_TOLERANCE[dtype] * expected.abs().max(), f"{name}: {error}"


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_oracle(world_size: int, dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    result = run_sharded(world_size, logits, labels, vocab_size=VOCAB, second_moments=True, chunk_tokens=3)
    assert_matches(result, make_reference(logits, labels, VOCAB), dtype)
    assert result["logprobs"][4] == 0.0
    assert (
        not result["logprobs_gradient"][:, VOCAB:].any() and not result["entropy_gradient"][:, VOCAB:].any()
    )
    assert not result["logprobs_gradient"][4].any() and not result["entropy_gradient"][4].any()


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_temperature(world_size: int, dtype: torch.dtype, temperature: float) -> None:
    logits, labels = make_inputs(dtype, scale=2.0)
    options = {"vocab_size": VOCAB, "second_moments": True, "temperature": temperature}
    result = run_sharded(world_size, logits, labels, **options)
    assert_matches(result, make_reference(logits, labels, VOCAB, temperature), dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.3])  # 0.3 divides the maximum of an empty shard into -inf
@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_padding(world_size: int, temperature: float) -> None:
    logits, labels = make_inputs(vocab=9, scale=2.0)
    options = {"vocab_size": 9, "second_moments": True, "temperature": temperature}
    result = run_sharded(world_size, logits, labels, **options)
    assert_matches(result, make_reference(logits, labels, 9, temperature), torch.float32)


def entropy_in_subgroup(rank: int, logits: Tensor, labels: Tensor) -> Tensor:
    """Two groups of two ranks; the second one has the rows in reverse."""
    groups: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rows = torch.arange(TOKENS) if rank < 2 else torch.arange(TOKENS).flip(0)
    shard = logits[rows].chunk(2, 1)[rank % 2]
    return token_stats(shard, labels[rows], group=groups[rank // 2], vocab_size=VOCAB).entropy


def test_group_of_some_ranks() -> None:
    logits, labels = make_inputs()
    expected = make_reference(logits, labels, VOCAB).entropy.float()
    results = run_on_ranks(4, entropy_in_subgroup, logits, labels)
    for result, rows in zip(results, (expected, expected, expected.flip(0), expected.flip(0)), strict=True):
        torch.testing.assert_close(result, rows, rtol=5e-7, atol=2e-6)


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("world_size", [1, 4])
def test_columns_at_minus_infinity(world_size: int, dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    labels[2], labels[3], labels[5], labels[6] = 3, 12, 12, 3
    logits[2, 10:20] = -math.inf  # a whole shard of four
    logits[3, :10] = logits[3, 15:] = -math.inf
    logits[5, :12] = logits[5, 13:] = -math.inf  # one finite column, the label
    logits[6, :12] = logits[6, 13:VOCAB] = -math.inf  # one finite column, elsewhere
    logits[4, ::2] = -math.inf  # ignored label
    result = run_sharded(world_size, logits, labels, vocab_size=VOCAB, second_moments=True)
    reference = make_reference(logits, labels, VOCAB)
    assert reference.logprobs[6] == -math.inf and result["logprobs"][6] == -math.inf
    for name in GRADIENTS:
        assert not result[name][~torch.isfinite(logits)].any()
        result[name][6] = getattr(reference, name)[6]  # its log-probability has no gradient
    assert_matches(result, reference, dtype)
    assert result["entropy"][5] == 0.0 and result["entropy"][6] == 0.0 and result["logprobs"][5] == 0.0


@pytest.mark.parametrize("offset", [300.0, -300.0])
@pytest.mark.parametrize("world_size", [1, 2])
def test_large_logits(world_size: int, offset: float) -> None:
    logits, labels = make_inputs()
    logits[:6] += offset
    logits[6:, ::2], logits[6:, 1::2] = 300.0, -300.0
    result = run_sharded(world_size, logits, labels, vocab_size=VOCAB, second_moments=True)
    assert_matches(result, make_reference(logits, labels, VOCAB), torch.float32)


def test_uniform_row_has_the_entropy_of_the_true_vocabulary() -> None:
    logits = torch.zeros(1, PADDED, requires_grad=True)
    entropy = token_stats(logits, torch.tensor([3]), vocab_size=VOCAB).entropy
    torch.testing.assert_close(entropy.detach(), torch.tensor([math.log(VOCAB)]))
    assert torch.autograd.grad(entropy, logits)[0].abs().max() < 1e-7


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_tokens(world_size: int) -> None:
    result = run_sharded(
        world_size, torch.zeros(0, PADDED), torch.zeros(0, dtype=torch.int64), second_moments=True
    )
    assert [result[name].shape for name in OUTPUTS] == [(0,)] * 5
    assert [result[name].shape for name in GRADIENTS] == [(0, PADDED)] * 2


def test_nan_logits_are_not_hidden() -> None:
    logits, labels = make_inputs()
    logits[2, 5] = math.nan
    stats = token_stats(logits, labels, vocab_size=VOCAB)
    assert stats.logprobs.isnan().nonzero().tolist() == [
        [2]
    ] and stats.entropy.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
def test_tensor_parallel_size_does_not_change_a_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(TOKENS, 256, generator=generator) * 4).to(dtype)
    labels = torch.randint(250, (TOKENS,), generator=generator)
    options = {"vocab_size": 250, "second_moments": True, "temperature": 0.9}
    whole = run_sharded(1, logits, labels, **options)
    for world_size in (2, 4, 8):
        for name, value in run_sharded(world_size, logits, labels, **options).items():
            assert torch.equal(value, whole[name]), (world_size, name)


@pytest.mark.parametrize("chunk_tokens", [1, 3, None])
def test_rows_without_gradient_are_zero_whatever_they_hold(chunk_tokens: int | None) -> None:
    logits, labels = make_inputs()
    logits[4] = math.nan  # ignored
    logits[7, 3] = math.nan
    logits.requires_grad_()
    stats = token_stats(logits, labels, vocab_size=VOCAB, chunk_tokens=chunk_tokens)
    used = torch.ones(TOKENS)
    used[7] = 0.0
    (gradient,) = torch.autograd.grad([stats.logprobs, stats.entropy], logits, [used, used])
    assert not gradient[[4, 7]].any() and gradient.isfinite().all() and gradient[3].any()


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
def test_chunks_do_not_change_a_bit(dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    whole = run_sharded(1, logits, labels, second_moments=True, temperature=0.9)
    for chunk_tokens in (1, 2, 5, 11, 100):
        result = run_sharded(
            1, logits, labels, second_moments=True, temperature=0.9, chunk_tokens=chunk_tokens
        )
        for name, value in whole.items():
            assert torch.equal(result[name], value), (chunk_tokens, name)


def count_collectives(rank: int, tokens: int, second_moments: bool) -> tuple[list[str], list[str]]:
    """Names of torch.distributed functions called in forward and in backward."""
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    words = ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv")
    for name in [
        n for n in dir(dist) if n.islower() and any(w in n for w in words) and callable(getattr(dist, n))
    ]:
        setattr(dist, name, counted(name, getattr(dist, name)))
    logits = torch.randn(tokens, 5, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    stats = token_stats(logits, labels, group=dist.group.WORLD, second_moments=second_moments)
    forward = list(calls)
    (stats.logprobs + stats.entropy).sum().backward()
    return forward, calls[len(forward) :]


@pytest.mark.parametrize("second_moments", [False, True])
@pytest.mark.parametrize("tokens", [0, 7])
def test_one_collective_forward_and_none_backward(tokens: int, second_moments: bool) -> None:
    for forward, backward in run_on_ranks(2, count_collectives, tokens, second_moments):
        assert forward == ["all_gather_into_tensor"] and backward == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_default_leaves_the_logits_alone_and_may_run_twice(dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    before = logits.clone()
    logits.requires_grad_()
    loss = token_stats(logits, labels, vocab_size=VOCAB).logprobs.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(logits, before) and torch.equal(first, second) and first.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reuse_logits_writes_the_gradient_over_them_once(dtype: torch.dtype) -> None:
    source, labels = make_inputs(dtype)
    source.requires_grad_()
    gradients = []
    for reuse_logits in (False, True):
        logits = source * 1.0
        stats = token_stats(logits, labels, vocab_size=VOCAB, chunk_tokens=4, reuse_logits=reuse_logits)
        loss = (stats.logprobs - 0.3 * stats.entropy).sum()
        loss.backward(retain_graph=True)
        assert source.grad is not None
        gradients.append(source.grad)
        source.grad = None
        assert torch.equal(logits, gradients[0]) == reuse_logits
    assert torch.equal(*gradients) and gradients[0].any()
    with pytest.raises(RuntimeError, match=r"reuse_logits=True allows one backward.*Set reuse_logits=False"):
        loss.backward()


def test_logits_changed_before_the_backward_are_refused() -> None:
    source, labels = make_inputs()
    logits = source.requires_grad_() * 1.0
    loss = token_stats(logits, labels, vocab_size=VOCAB).logprobs.sum()
    logits.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kernel", [torch_kernel, triton_kernel])
def test_reused_logits_are_refused_to_others(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stats_module, "kernel_for", lambda logits: kernel)
    source, labels = make_inputs()
    source.requires_grad_()
    logits = torch.tanh(source)  # whose backward needs its own output
    loss = token_stats(logits, labels, vocab_size=VOCAB, reuse_logits=True).logprobs.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_triton_and_torch_agree_inside_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = make_inputs()
    results = []
    for kernel in (torch_kernel, triton_kernel):
        monkeypatch.setattr(token_stats_module, "kernel_for", lambda logits, kernel=kernel: kernel)
        results.append(run_sharded(2, logits, labels, vocab_size=VOCAB, second_moments=True, temperature=0.7))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=2e-6, atol=2e-6)


def test_only_the_logits_are_saved_at_full_size() -> None:
    source, labels = make_inputs()
    logits = source.requires_grad_() * 1.0
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        token_stats(logits, labels, vocab_size=VOCAB, second_moments=True)
    large = [tensor for tensor in saved if tensor.numel() > TOKENS]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def test_second_moments_carry_no_gradient_and_are_off_by_default() -> None:
    logits, labels = make_inputs()
    stats = token_stats(logits.requires_grad_(), labels, vocab_size=VOCAB, second_moments=True)
    assert stats.sum_p2 is not None and not stats.sum_p2.requires_grad
    assert stats.baseline is not None and not stats.baseline.requires_grad
    assert stats.alignment is not None and not stats.alignment.requires_grad
    assert stats.logprobs.requires_grad and stats.entropy.requires_grad
    stats = token_stats(logits, labels, vocab_size=VOCAB)
    assert stats.sum_p2 is None and stats.baseline is None and stats.alignment is None


def test_gradient_of_a_gradient_is_refused() -> None:
    logits, labels = make_inputs()
    loss = token_stats(logits.requires_grad_(), labels, vocab_size=VOCAB).entropy.square().sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_strided_logits() -> None:
    logits, labels = make_inputs()
    columns_first = logits.t().contiguous().t()
    result = run_sharded(1, columns_first, labels, vocab_size=VOCAB, chunk_tokens=3)
    assert_matches(result, make_reference(logits, labels, VOCAB), torch.float32)
