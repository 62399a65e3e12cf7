"""What Transformer Engine is told: the buffers of policy.options.tp_overlap, and where packed sequences begin."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from policy_fixtures import make_groups, on_layout, pack_for, save_model

from megatron_fec.config import PolicyConfig
from megatron_fec.policy import tensor_overlap
from megatron_fec.policy.model import packed_seq_params
from megatron_fec.policy.step import Policy, compute_logprobs, cores

TP2_SP: dict[str, Any] = {"tensor_parallel": 2, "sequence_parallel": True}


@pytest.mark.parametrize("version", ["2.7.0", "2.6.0"])
@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise"])
def test_the_buffers_of_tensor_overlap(version: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What initialize_ub of Transformer Engine is called with, by its signature before and since 2.7."""
    calls: list[dict[str, Any]] = []
    module: Any = ModuleType("module")
    module.base = SimpleNamespace(
        initialize_ub=lambda **kwargs: calls.append(kwargs),
        UserBufferQuantizationMode=SimpleNamespace(FP8="fp8", NONE="none"),
    )
    pytorch: Any = ModuleType("transformer_engine.pytorch")
    pytorch.module = module
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setattr(tensor_overlap, "is_te_min_version", lambda least: version >= least)
    tensor_overlap._initialize.cache_clear()
    settings: dict[str, Any] = {**TP2_SP, "context_parallel": 2, "micro_batch_tokens": 1024}
    chosen = PolicyConfig(precision=precision, options={"tp_overlap": True}, **settings)
    for _ in range(2):  # a second policy of the process
        tensor_overlap.initialize_tp_overlap(chosen, hidden_size=96)
    tensor_overlap.initialize_tp_overlap(PolicyConfig(**settings), hidden_size=96)
    is_fp8 = precision != "bf16"
    wanted: dict[str, Any] = {"shape": [512, 96], "tp_size": 2, "ub_cfgs": {}, "bootstrap_backend": "nccl"}
    if version == "2.7.0":
        wanted["quantization_modes"] = ["fp8", "none"] if is_fp8 else ["none"]
    else:
        wanted["use_fp8"] = is_fp8
    assert calls == [wanted]
    tensor_overlap._initialize.cache_clear()


@pytest.mark.parametrize("context", [1, 2])
def test_what_attention_is_told_of_packed_sequences(tmp_path: Path, context: int) -> None:
    """Starts and lengths of the whole sequences on every context rank; padded and plain starts are one tensor."""

    def job(policy: Policy) -> list[tuple[list[int], int, bool, int]]:
        (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=32)
        seen: list[Any] = []
        layer: Any = cores(policy)[0].decoder.layers[0]
        attention = layer.self_attention.core_attention
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["packed_seq_params"], args[0].shape[0])),
            with_kwargs=True,
        )
        compute_logprobs(policy, [batches])
        return [
            (
                packed.cu_seqlens_q.tolist(),
                packed.max_seqlen_q,
                packed.cu_seqlens_q_padded is packed.cu_seqlens_q
                and packed.cu_seqlens_kv_padded is packed.cu_seqlens_kv
                and packed.cu_seqlens_kv is packed.cu_seqlens_q,
                tokens,
            )
            for packed, tokens in seen
        ]

    chosen = PolicyConfig(
        precision="fp32", distributed_optimizer=False, context_parallel=context, micro_batch_tokens=32
    )
    ranks = on_layout(save_model(tmp_path, "qwen3"), job, chosen)
    assert len(ranks) == context and all(rank == ranks[0] for rank in ranks)
    for starts, longest, are_one, tokens in ranks[0]:
        lengths = [end - start for start, end in pairwise(starts)]
        assert max(lengths) == longest and are_one
        assert starts[-1] == tokens * context  # nothing lies behind the last sequence
        assert context == 1 or all(length % (2 * context) == 0 for length in lengths)


def test_packed_sequences_name_their_format() -> None:
    starts = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed = packed_seq_params(SimpleNamespace(cu_seqlens=starts, max_seqlen=4))  # type: ignore[arg-type]
    assert packed.qkv_format == "thd" and packed.max_seqlen_kv == 4 and packed.cp_group is None
