"""The Triton kernels against the float64 oracle and against torch_kernel: on a GPU if there is one, else interpreted.

Shards are run one after the other in this process; merge_sums sees them as the blocks of one rank.
"""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from vocab_reference import VocabReference, vocab_reference

from megatron_fec.vocab_parallel import torch_kernel, triton_kernel
from megatron_fec.vocab_parallel.merge import merge_sums
from megatron_fec.vocab_parallel.shard import Shard, VocabLayout
from megatron_fec.vocab_parallel.token_stats import row_gradients

# What the interpreter's numpy says where a GPU silently gives the infinity or NaN that the kernels expect.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = triton_kernel.TILE[DEVICE]
TOKENS, PADDED = 7, 5 * TILE - 4  # a row is four tiles and a part of one
VOCAB = PADDED - 9
VALUES = ("logprobs", "entropy", "sum_p2", "baseline")
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)


def make_inputs(
    dtype: torch.dtype = torch.float32, *, vocab: int = VOCAB, scale: float = 4.0
) -> tuple[Tensor, Tensor]:
    """[7, PADDED] logits, whose padding would win every maximum or spoil every sum; [7] labels, one ignored."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(TOKENS, PADDED, generator=generator) * scale
    logits[:, vocab:] = 1e4
    logits[:, vocab::2] = math.nan
    labels = torch.randint(vocab, (TOKENS,), generator=generator)
    labels[0], labels[1], labels[4] = 0, vocab - 1, -100
    return logits.to(dtype), labels


def make_grads() -> tuple[Tensor, Tensor]:
    """Upstream gradients of logprobs and entropy, [7] fp32."""
    generator = torch.Generator().manual_seed(6)
    both = torch.randn(2, TOKENS, generator=generator)
    return both[0], both[1]


def make_shards(width: int, vocab: int, *, shards: int, blocks: int) -> list[Shard]:
    width //= shards
    starts = range(0, shards * width, width)
    return [
        Shard(start=start, width=width, valid=min(max(vocab - start, 0), width), blocks=blocks)
        for start in starts
    ]


def run(
    logits: Tensor,
    labels: Tensor,
    *,
    kernel: ModuleType = triton_kernel,
    vocab: int = VOCAB,
    shards: int = 1,
    blocks: int = 1,
    temperature: float = 1.0,
    in_place: bool = False,
    entropy_gradient: bool = True,
) -> dict[str, Tensor]:
    """Sums of the blocks, statistics of the rows, and the gradient of sum(gl logp + gh H) put together, on the CPU."""
    pieces = [piece.contiguous() for piece in logits.to(DEVICE).chunk(shards, 1)]
    parts = make_shards(logits.shape[1], vocab, shards=shards, blocks=blocks)
    settings: dict[str, Any] = {"temperature": temperature, "chunk_tokens": None}
    labels = labels.to(DEVICE)
    sums = torch.cat(
        [
            kernel.shard_sums(piece, labels, shard=part, second_moments=True, **settings)
            for piece, part in zip(pieces, parts, strict=True)
        ],
        1,
    )
    (whole,) = make_shards(logits.shape[1], vocab, shards=1, blocks=1)
    layout = VocabLayout(shard=whole, vocab_size=vocab, group=None, ranks=1)
    row = merge_sums(sums, labels, layout=layout, temperature=temperature)
    gl, gh = (grad.to(DEVICE) for grad in make_grads())
    grads = row_gradients(gl, gh if entropy_gradient else None, labels, row.logprobs, temperature)
    outputs = [piece if in_place else torch.full_like(piece, math.nan) for piece in pieces]
    for out, piece, part in zip(outputs, pieces, parts, strict=True):
        statistics = (row.maxima, row.log_s0, row.centre)
        kernel.write_gradient(out, piece, labels, row=statistics, grads=grads, shard=part, **settings)
    values = zip(VALUES, (row.logprobs, row.entropy, *row.second[:2]), strict=True)
    return {"sums": sums.cpu(), "gradient": torch.cat(outputs, 1).cpu()} | {
        name: value.cpu() for name, value in values
    }


def make_reference(
    logits: Tensor, labels: Tensor, vocab: int = VOCAB, temperature: float = 1.0
) -> VocabReference:
    gl, gh = make_grads()
    return vocab_reference(
        logits, labels, vocab_size=vocab, grad_logprobs=gl, grad_entropy=gh, temperature=temperature
    )


def assert_matches(result: dict[str, Tensor], reference: VocabReference) -> None:
    for name in VALUES:
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(
            result[name].double(), getattr(reference, name), rtol=5e-7, atol=2e-6, msg=name
        )
    expected = reference.logprobs_gradient + reference.entropy_gradient
    error = (result["gradient"].double() - expected).abs().max()
    assert error <= GRADIENT_TOLERANCE[result["gradient"].dtype] * expected.abs().max(), error


@DTYPES
@pytest.mark.parametrize(("shards", "blocks"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_oracle(shards: int, blocks: int, dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    result = run(logits, labels, shards=shards, blocks=blocks)
    assert_matches(result, make_reference(logits, labels))
    assert result["gradient"].dtype == dtype and result["sums"].shape == (TOKENS, shards * blocks, 6)
    assert result["logprobs"][4] == 0.0
    assert not result["gradient"][:, VOCAB:].any() and not result["gradient"][4].any()


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("shards", [1, 2])
def test_temperature(shards: int, temperature: float) -> None:
    logits, labels = make_inputs(scale=2.0)
    result = run(logits, labels, shards=shards, temperature=temperature)
    assert_matches(result, make_reference(logits, labels, VOCAB, temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.3])  # 0.3 divides the maximum of an empty shard into -inf
@pytest.mark.parametrize(("shards", "blocks"), [(2, 1), (4, 2)])
def test_shards_of_padding(shards: int, blocks: int, temperature: float) -> None:
    logits, labels = make_inputs(vocab=9, scale=2.0)
    result = run(logits, labels, vocab=9, shards=shards, blocks=blocks, temperature=temperature)
    assert_matches(result, make_reference(logits, labels, 9, temperature))
    empty = torch.tensor([torch.finfo(torch.float32).min, 0.0, 0.0, -math.inf, 0.0, 0.0])
    assert (result["sums"][:, blocks:] == empty).all()


@DTYPES
@pytest.mark.parametrize("shards", [1, 4])
def test_columns_at_minus_infinity(shards: int, dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    width, label = PADDED // 4, PADDED // 4 + 5
    labels[2], labels[3], labels[5], labels[6] = 3, label, label, 3
    logits[2, width : 2 * width] = -math.inf  # a whole shard of four
    logits[3, : width + 1] = logits[3, width + 9 :] = -math.inf  # whole tiles
    logits[5, :label] = logits[5, label + 1 :] = -math.inf  # one finite column, the label
    logits[6, :label] = logits[6, label + 1 :] = -math.inf  # one finite column, elsewhere
    logits[4, ::2] = -math.inf  # ignored label
    logits[:, VOCAB:] = 1e4
    result, reference = run(logits, labels, shards=shards), make_reference(logits, labels)
    assert reference.logprobs[6] == -math.inf and result["logprobs"][6] == -math.inf
    assert not result["gradient"][~torch.isfinite(logits)].any()
    reference.logprobs_gradient[6] = result["gradient"][6]  # its log-probability has no gradient
    assert_matches(result, reference)
    assert result["entropy"][5] == 0.0 and result["entropy"][6] == 0.0 and result["logprobs"][5] == 0.0


@pytest.mark.parametrize("offset", [300.0, -300.0])
@pytest.mark.parametrize("shards", [1, 2])
def test_large_logits(shards: int, offset: float) -> None:
    logits, labels = make_inputs()
    logits[:4] += offset
    logits[4:, ::2], logits[4:, 1::2] = 300.0, -300.0
    assert_matches(run(logits, labels, shards=shards), make_reference(logits, labels))


def test_sorted_logits_move_the_sums_in_every_tile() -> None:
    logits, labels = make_inputs()
    logits[:, :VOCAB] = logits[:, :VOCAB].sort(1).values
    logits[:3, :VOCAB] = logits[:3, :VOCAB].flip(1)
    assert_matches(run(logits, labels), make_reference(logits, labels))


def test_gradient_of_the_log_probability_alone() -> None:
    logits, labels = make_inputs()
    result, reference = run(logits, labels, shards=2, entropy_gradient=False), make_reference(logits, labels)
    reference.entropy_gradient.zero_()
    assert_matches(result, reference)


@DTYPES
@pytest.mark.parametrize(("shards", "blocks"), [(1, 2), (2, 2)])
def test_same_as_torch(shards: int, blocks: int, dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    logits[5, : PADDED // 2] = -math.inf
    settings: dict[str, Any] = {"shards": shards, "blocks": blocks, "temperature": 0.7}
    result, expected = (
        run(logits, labels, kernel=kernel, **settings) for kernel in (triton_kernel, torch_kernel)
    )
    assert torch.equal(result["sums"][..., [0, 3]], expected["sums"][..., [0, 3]])  # m and t
    torch.testing.assert_close(result["sums"], expected["sums"], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(
        result["gradient"], expected["gradient"], rtol=GRADIENT_TOLERANCE[dtype], atol=1e-6
    )


@DTYPES
def test_in_place_gives_the_same_bits(dtype: torch.dtype) -> None:
    logits, labels = make_inputs(dtype)
    apart, over = (run(logits, labels, shards=2, blocks=2, in_place=in_place) for in_place in (False, True))
    assert torch.equal(apart["gradient"], over["gradient"]) and apart["gradient"].any()


def test_blocks_have_the_same_bits_in_every_layout() -> None:
    logits, labels = make_inputs()
    logits, vocab = logits.repeat(1, 2)[:, : 8 * TILE], 8 * TILE - 3
    logits[~torch.isfinite(logits)] = 0.0
    results = [
        run(logits, labels, vocab=vocab, shards=shards, blocks=8 // shards, temperature=0.7)
        for shards in (1, 2, 8)
    ]
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(result[name], value), name


@pytest.mark.parametrize("columns_first", [False, True])
def test_strides(columns_first: bool) -> None:
    """Views of logits, of a gradient of another layout and of labels; what lies around them is left alone."""
    logits, labels = (tensor.to(DEVICE) for tensor in make_inputs())
    buffer = torch.full((TOKENS + 2, PADDED + 5), 7.0, device=DEVICE)
    if columns_first:
        buffer = buffer.t().contiguous().t()
    view = buffer[1:-1, 2:-3]
    view.copy_(logits)
    every_other = labels.repeat_interleave(2)[::2]
    (shard,) = make_shards(PADDED, VOCAB, shards=1, blocks=2)
    settings: dict[str, Any] = {"shard": shard, "temperature": 0.7, "chunk_tokens": None}
    two = torch.full((TOKENS,), 2.0, device=DEVICE)
    gl, gh = (grad.to(DEVICE) for grad in make_grads())
    row, grads = (two, two, two), (gl, gh, gl)
    expected = triton_kernel.shard_sums(logits, labels, second_moments=True, **settings)
    gradient = torch.empty_like(logits)
    triton_kernel.write_gradient(gradient, logits, labels, row=row, grads=grads, **settings)
    assert torch.equal(triton_kernel.shard_sums(view, every_other, second_moments=True, **settings), expected)
    apart = torch.empty_like(logits)
    triton_kernel.write_gradient(apart, view, every_other, row=row, grads=grads, **settings)
    triton_kernel.write_gradient(view, view, every_other, row=row, grads=grads, **settings)
    assert torch.equal(apart, gradient) and torch.equal(view, gradient)
    view.fill_(7.0)
    assert (buffer == 7.0).all()


def test_offsets_beyond_32_bits() -> None:
    """4 GiB of address space; on the CPU only the pages of the three rows become memory."""
    logits = torch.empty_strided((3, 5), (2**30 + 16, 1), dtype=torch.bfloat16, device=DEVICE)
    logits.copy_(torch.arange(15).view(3, 5))
    labels, zeros = torch.tensor([0, 1, 4], device=DEVICE), torch.zeros(3, device=DEVICE)
    shard = Shard(start=0, width=5, valid=5, blocks=1)
    settings: dict[str, Any] = {"shard": shard, "temperature": 1.0, "chunk_tokens": None}
    sums = triton_kernel.shard_sums(logits, labels, second_moments=False, **settings)
    assert sums[:, 0, 0].tolist() == [4.0, 9.0, 14.0] and sums[:, 0, 3].tolist() == [0.0, 6.0, 14.0]
    row, grads = (zeros + 20, zeros, zeros), (zeros, zeros + 3, None)  # all p are nearly 0
    triton_kernel.write_gradient(logits, logits, labels, row=row, grads=grads, **settings)
    assert logits.nonzero().tolist() == [[0, 0], [1, 1], [2, 4]]


def test_no_tokens() -> None:
    logits, labels = torch.zeros(0, PADDED, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    (shard,) = make_shards(PADDED, VOCAB, shards=1, blocks=2)
    settings: dict[str, Any] = {"shard": shard, "temperature": 1.0, "chunk_tokens": None}
    for second_moments, size in ((False, 4), (True, 6)):
        sums = triton_kernel.shard_sums(logits, labels, second_moments=second_moments, **settings)
        assert sums.shape == (0, 2, size)
    none = torch.zeros(0, device=DEVICE)
    row, grads = (none, none, none), (none, none, None)
    triton_kernel.write_gradient(logits, logits, labels, row=row, grads=grads, **settings)


def test_labels_elsewhere_are_not_read() -> None:
    logits, _ = make_inputs()
    shard = Shard(start=PADDED, width=PADDED, valid=VOCAB, blocks=2)
    inside = PADDED + PADDED // 2
    labels = torch.tensor([-100, -1, PADDED - 1, PADDED + VOCAB, 2**62, -(2**62), inside])
    arguments = (logits.to(DEVICE), labels.to(DEVICE))
    settings: dict[str, Any] = {"shard": shard, "temperature": 1.0, "chunk_tokens": None}
    sums = triton_kernel.shard_sums(*arguments, second_moments=False, **settings)
    expected = torch.full((TOKENS, 2), -math.inf)
    expected[6, PADDED // 2 // shard.block_width] = logits[6, PADDED // 2]
    assert torch.equal(sums[:, :, 3].cpu(), expected)
    full = triton_kernel.shard_sums(*arguments, second_moments=True, **settings)
    assert torch.equal(full[..., :4], sums) and sums.is_contiguous()
    out, zeros = torch.empty_like(arguments[0]), torch.zeros(TOKENS, device=DEVICE)
    row, grads = (zeros + 1e6, zeros, zeros), (zeros + 1, zeros + 1, None)  # all p are 0
    triton_kernel.write_gradient(out, *arguments, row=row, grads=grads, **settings)
    assert out.nonzero().tolist() == [[6, PADDED // 2]]


@pytest.mark.parametrize("column", [0, TILE + 3, VOCAB - 1])
def test_nan_logits_are_not_hidden(column: int) -> None:
    logits, labels = make_inputs()
    logits[2, column] = math.nan
    result = run(logits, labels, shards=2, blocks=2)
    for name in VALUES:
        assert result[name].isnan().nonzero().flatten().tolist() == [2]
    assert result["sums"][..., 1].isnan().sum() == 1 and result["gradient"][2, :VOCAB].isnan().all()


def test_rows_without_gradient_are_not_read() -> None:
    logits, labels = make_inputs()
    logits[3], logits[4] = math.nan, math.nan
    arguments = (logits.to(DEVICE), labels.to(DEVICE))
    (shard,) = make_shards(PADDED, VOCAB, shards=1, blocks=1)
    nan = torch.full((TOKENS,), math.nan, device=DEVICE)
    used = torch.eye(3, TOKENS, device=DEVICE)
    used[0, 4] = 1.0
    out = torch.full_like(arguments[0], 5.0)
    row, grads = (nan, nan, nan), (used[0], used[1], used[2])
    settings: dict[str, Any] = {"shard": shard, "temperature": 1.0, "chunk_tokens": None}
    triton_kernel.write_gradient(out, *arguments, row=row, grads=grads, **settings)
    assert out[[0, 1, 2, 4], :VOCAB].isnan().all() and not out[[3, 5, 6]].any()


def compile_for_hopper() -> dict[str, str]:
    """PTX of both kernels for bf16 logits in rows of a multiple of 16, by ptxas too; needs no GPU, but the compiler."""
    texts = {}
    for kernel in (triton_kernel._sums_kernel, triton_kernel._gradient_kernel):
        pointers = {
            "sums": "*fp32",
            "coefficients": "*fp32",
            "labels": "*i64",
            "logits": "*bf16",
            "out": "*bf16",
        }
        types = pointers | {"scale": "fp32", "ln2": "fp32"}
        constants = {
            "has_second": True,
            "tile": triton_kernel.TILE["cuda"],
            "column_stride": 1,
            "out_column_stride": 1,
        }
        aligned = {*pointers, "row_stride", "out_row_stride", "width", "block_width"}
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
        )
        options = {"num_warps": 4, "enable_fp_fusion": True}
        compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        texts[kernel.__name__] = compiled.asm["ptx"]
    return texts


def test_compiles_for_hopper_with_vector_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        texts = pool.submit(compile_for_hopper).result(timeout=120)
    per_thread = triton_kernel.TILE["cuda"] // 128 // 8  # 16 bytes are 8 logits
    for name, text in texts.items():
        lines = text.splitlines()
        loads = [line for line in lines if "ld.global" in line and ".v4.b32" in line]
        stores = [line for line in lines if "st.global" in line and ".v4.b32" in line]
        assert len(loads) == per_thread * (2 if "sums" in name else 1), name  # full tiles, and the last one
        assert len(stores) == (per_thread if "gradient" in name else 0), name
