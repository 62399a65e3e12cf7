"""Metrics as (sum, count) pairs: they are added over micro-batches and ranks and divided once, at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HISTOGRAM_BINS = 400  # of [0, 1]: quantiles of a clip distance are known to 1/400


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSums:
    """Named (sum, count) pairs and histograms, equal in names and order on every rank that adds them."""

    names: tuple[str, ...]
    sums: Tensor  # [K, 2] fp64: sum, count
    histogram_names: tuple[str, ...] = ()
    histograms: Tensor  # [H, HISTOGRAM_BINS] fp64 counts

    @staticmethod
    def of(
        pairs: Mapping[str, tuple[Tensor, Tensor]], histograms: Mapping[str, Tensor] | None = None
    ) -> MetricSums:
        """From scalar (sum, count) pairs; detached. Each histogram entry is a [M] tensor of values to be counted."""
        histograms = histograms or {}
        sums = torch.stack(
            [torch.stack([s.detach().double(), n.detach().double()]) for s, n in pairs.values()]
        )
        counts = [
            torch.histc(v.detach().float(), HISTOGRAM_BINS, 0.0, 1.0).double() for v in histograms.values()
        ]
        return MetricSums(
            names=tuple(pairs),
            sums=sums,
            histogram_names=tuple(histograms),
            histograms=torch.stack(counts) if counts else sums.new_zeros(0, HISTOGRAM_BINS),
        )

    def joined(self, other: MetricSums) -> MetricSums:
        """These and the other's, whose names are different ones."""
        return MetricSums(
            names=self.names + other.names,
            sums=torch.cat([self.sums, other.sums]),
            histogram_names=self.histogram_names + other.histogram_names,
            histograms=torch.cat([self.histograms, other.histograms]),
        )

    def with_pair(self, name: str, pair: tuple[Tensor, Tensor]) -> MetricSums:
        """One more (sum, count), in front."""
        row = torch.stack([value.detach().double() for value in pair])
        return replace(self, names=(name, *self.names), sums=torch.cat([row.unsqueeze(0), self.sums]))

    def __add__(self, other: MetricSums) -> MetricSums:
        assert self.names == other.names and self.histogram_names == other.histogram_names
        return self.replaced(self.flat() + other.flat())

    def flat(self) -> Tensor:
        """[K * 2 + H * HISTOGRAM_BINS] fp64: one tensor for one all-reduce."""
        return torch.cat([self.sums.reshape(-1), self.histograms.reshape(-1)])

    def replaced(self, flat: Tensor) -> MetricSums:
        """The same names over the values of `flat`."""
        split = self.sums.numel()
        return MetricSums(
            names=self.names,
            sums=flat[:split].view_as(self.sums),
            histogram_names=self.histogram_names,
            histograms=flat[split:].view_as(self.histograms),
        )

    def means(self) -> dict[str, float]:
        """Each sum over its count (0 where nothing was counted), and the 10, 50 and 90 % quantiles of the histograms."""
        sums = self.sums.cpu()
        means = {name: (s / n if n else 0.0) for name, (s, n) in zip(self.names, sums.tolist(), strict=True)}
        for name, counts in zip(self.histogram_names, self.histograms.cpu(), strict=True):
            for percent in (10, 50, 90):
                means[f"{name}_p{percent}"] = _quantile(counts, percent / 100)
        return means


def _quantile(counts: Tensor, q: float) -> float:
    """Centre of the bin in which the cumulated count passes q; 0 for an empty histogram."""
    total = counts.sum()
    if total == 0:
        return 0.0
    first = int(torch.searchsorted(counts.cumsum(0), q * total))
    return (min(first, HISTOGRAM_BINS - 1) + 0.5) / HISTOGRAM_BINS
