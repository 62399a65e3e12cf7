"""Seconds of a collective: the bytes that a rank sends, over the slowest link that its group crosses."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fec.planning import assumptions
from megatron_fec.planning.gpus import Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    gpu: Gpu
    gpus_per_node: int

    def is_inside(self, span: int) -> bool:
        """Whether a group whose ranks lie within `span` neighbours stays in one node."""
        return span <= self.gpus_per_node and self.gpus_per_node % span == 0

    def bandwidth(self, span: int) -> float:
        link = self.gpu.nvlink if self.is_inside(span) else self.gpu.network
        return link * assumptions.LINK

    def all_reduce(self, size: float, ranks: int, span: int) -> float:
        """Also a reduce-scatter and an all-gather after each other."""
        return 2 * self.gather(size, ranks, span)

    def gather(self, size: float, ranks: int, span: int) -> float:
        """An all-gather to, a reduce-scatter from, or an all-to-all of `size` bytes a rank."""
        return size * (ranks - 1) / ranks / self.bandwidth(span)

    def send(self, size: float, span: int) -> float:
        return size / self.bandwidth(span)
