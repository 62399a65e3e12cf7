"""Buckets of weights: what goes in comes out, and a checksum that no single change survives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from megatron_fec.errors import ConfigError
from megatron_fec.rollout.engine import engine_weights
from megatron_fec.rollout.weight_transfer import (
    GOLDEN,
    GlooSender,
    check_other_gpu,
    checksum,
    combined,
    gloo_group,
    make_buckets,
    unpacked,
)

SHAPES = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((), torch.float32), ((4, 4), torch.float32)]


def some_weights() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (f"w{i}", torch.randn(shape, generator=generator).to(dtype))
        for i, (shape, dtype) in enumerate(SHAPES)
    ]


def test_weights_survive_the_buckets() -> None:
    for limit, names in ((76, [["w0", "w1"], ["w2", "w3"]]), (1, [["w0"], ["w1"], ["w2"], ["w3"]])):
        buckets = list(make_buckets(some_weights(), limit=limit))
        assert [bucket.names for bucket in buckets] == names
        assert [bucket.number for bucket in buckets] == list(range(len(names)))
        back = [pair for b in buckets for pair in unpacked(b.data, b.names, b.dtypes, b.shapes)]
        for (name, tensor), (name_0, tensor_0) in zip(back, some_weights(), strict=True):
            assert name == name_0 and tensor.dtype == tensor_0.dtype and torch.equal(tensor, tensor_0)


def test_a_bucket_is_a_copy() -> None:
    """The optimizer moves the weights while engines that come back are fed with it."""
    weight = torch.ones(8)
    (bucket,) = make_buckets([("w", weight)])
    weight.zero_()
    assert torch.equal(bucket.data.view(torch.float32), torch.ones(8))


def test_the_checksum_by_hand() -> None:
    words = [3, 0, 5]
    data = torch.tensor(words, dtype=torch.int64).view(torch.uint8)
    odd = GOLDEN % (1 << 64)
    expected = sum(word * ((i * odd % (1 << 64)) | 1) for i, word in enumerate(words)) % (1 << 64)
    assert checksum(data) == expected
    assert checksum(torch.empty(0, dtype=torch.uint8)) == 0


@settings(max_examples=200, deadline=None)
@given(data=st.binary(min_size=8, max_size=400), place=st.integers(0), bit=st.integers(0, 7))
def test_one_bit_changes_the_checksum(data: bytes, place: int, bit: int) -> None:
    whole = torch.frombuffer(bytearray(data[: len(data) // 8 * 8]), dtype=torch.uint8)
    flipped = whole.clone()
    flipped[place % len(whole)] ^= 1 << bit
    assert checksum(whole) != checksum(flipped)


def test_the_order_of_words_and_of_buckets_counts() -> None:
    assert checksum(torch.tensor([1, 2]).view(torch.uint8)) != checksum(
        torch.tensor([2, 1]).view(torch.uint8)
    )
    assert combined([1, 2]) != combined([2, 1])
    assert combined([(1 << 64) - 1, 0]) != combined([0, (1 << 64) - 1])


def test_gloo_carries_a_bucket_beside_the_default_group() -> None:
    def work(rank: int) -> int:
        """Rank 0 of the world is the trainer, the other one an engine."""
        data = torch.arange(1000, dtype=torch.int64).view(torch.uint8)
        if rank == 0:
            sender = GlooSender(address="127.0.0.1", world_size=2, timeout=30)
            torch.distributed.broadcast_object_list([sender.meeting["master_port"]], src=0)
            sender.connect()
            sender.send(data)
            return checksum(data)
        box = [0]
        torch.distributed.broadcast_object_list(box, src=0)
        store = TCPStore("127.0.0.1", box[0], 2, False, wait_for_workers=False)
        group = gloo_group(store, rank=1, size=2, address="127.0.0.1", timeout=30)
        received = torch.empty_like(data)
        group.broadcast(received, 0).wait()
        return checksum(received)

    one, other = run_on_ranks(2, work)
    assert one == other


def test_engines_get_true_rows_and_the_head_of_a_tied_model() -> None:
    embedding, head = torch.arange(12.0).view(6, 2), torch.ones(6, 2)
    stream = [("model.embed_tokens.weight", embedding), ("norm", torch.ones(2)), ("lm_head.weight", head)]
    tied = dict(engine_weights(stream, vocab_size=4, is_tied=True))
    assert torch.equal(tied["lm_head.weight"], embedding[:4]) and len(tied) == 3
    own = dict(engine_weights(stream, vocab_size=4, is_tied=False))
    assert torch.equal(own["lm_head.weight"], head[:4]) and own["model.embed_tokens.weight"].shape == (4, 2)


def test_a_server_on_the_trainers_gpu_is_refused() -> None:
    check_other_gpu("GPU-1", "GPU-2")
    with pytest.raises(
        ConfigError, match=r"has GPU GPU-1, on which .* or share this one by rollout\.engine=vllm"
    ):
        check_other_gpu("GPU-1", "GPU-1")
