"""The experts' weights on their way in and out of Megatron, in any layout of EP, ETP and PP.

mbridge reads them; it knows the names of Transformer Engine's grouped products only. It does not write them here: it
gathers over the wrong group where EP is 1 or TP and ETP differ, and sends each expert's name through the pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fec.policy.device import device
from megatron_fec.policy.parallel import ParallelLayout

LOCAL_NAME = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")  # of SequentialMLP
GROUPED_NAME = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
HF_NAME = "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


class GroupedNames:
    """A GPTModel as mbridge should see it: its experts are named as Transformer Engine's grouped products name them."""

    def __init__(self, model: torch.nn.Module, *, has_experts: bool = True) -> None:
        self._model = model
        self._has_experts = has_experts
        self.decoder = model.decoder

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self._renamed(self._model.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        return dict(self._renamed(iter(self._model.state_dict().items())))

    def _renamed(self, items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, value in items:
            name = LOCAL_NAME.sub(r".experts.\2.weight\1", name)
            if self._has_experts or not GROUPED_NAME.match(name):
                yield name, value


def expert_weights(models: Sequence[Any], layout: ParallelLayout) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of each expert's projections by Hugging Face's names; every rank must iterate it all.

    models: this rank's chunks.

    One expert of each EP rank is gathered at a time: two all-gathers, and a broadcast where there are pipeline stages.
    """
    config: Any = models[0].config
    own = {
        (model.decoder.layers[int(match[1])].layer_number - 1, match[2], int(match[3])): parameter
        for model in models
        for name, parameter in GroupedNames(model).named_parameters()
        if (match := GROUPED_NAME.match(name))
    }
    owners = _owners(sorted({layer for layer, _, _ in own}), layout)
    count = config.num_moe_experts // dist.get_world_size(layout.expert_group)
    for layer in range(config.num_layers):
        for local in range(count):
            for part in ("linear_fc1", "linear_fc2"):
                shard = own.get((layer, part, local))
                parts = _gathered(_from_stage(shard, owners[layer], config, layout, part), layout, part)
                for rank, projections in enumerate(parts):
                    for projection, tensor in projections.items():
                        expert = rank * count + local
                        yield HF_NAME.format(layer=layer, expert=expert, projection=projection), tensor


def _owners(numbers: list[int], layout: ParallelLayout) -> dict[int, int]:
    """The pipeline rank of each layer."""
    everyone: list[Any] = [None] * layout.pipeline_parallel
    dist.all_gather_object(everyone, numbers, group=layout.pipeline_group)
    return {number: stage for stage, owned in enumerate(everyone) for number in owned}


def _from_stage(shard: Tensor | None, stage: int, config: Any, layout: ParallelLayout, part: str) -> Tensor:
    """This rank's shard of the expert, from the pipeline rank that has the layer."""
    if layout.pipeline_parallel == 1:
        assert shard is not None
        return shard
    if shard is None:
        width = config.moe_ffn_hidden_size // dist.get_world_size(layout.expert_tensor_group)
        shape = (2 * width, config.hidden_size) if part == "linear_fc1" else (config.hidden_size, width)
        shard = torch.empty(shape, dtype=config.params_dtype, device=device())
    dist.broadcast(shard, group=layout.pipeline_group, group_src=stage)
    return shard


def _gathered(shard: Tensor, layout: ParallelLayout, part: str) -> list[dict[str, Tensor]]:
    """Of each EP rank in order: the projections of its expert by name, put together over ETP."""
    shards = [shard]
    for group in (layout.expert_tensor_group, layout.expert_group):
        size = dist.get_world_size(group)
        if size > 1:
            stacked = torch.stack(shards)
            everyone = [torch.empty_like(stacked) for _ in range(size)]
            dist.all_gather(everyone, stacked, group=group)
            shards = list(torch.cat(everyone))
    split = dist.get_world_size(layout.expert_tensor_group)
    experts = [shards[start : start + split] for start in range(0, len(shards), split)]
    if part == "linear_fc2":
        return [{"down_proj": torch.cat(pieces, dim=1)} for pieces in experts]
    halves = [[piece.chunk(2) for piece in pieces] for pieces in experts]
    return [
        {"gate_proj": torch.cat([g for g, _ in pairs]), "up_proj": torch.cat([u for _, u in pairs])}
        for pairs in halves
    ]
