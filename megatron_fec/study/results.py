"""From the records to verdicts: each claim, in each bed, over the seeds that have the runs it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_fec.study.experiments import EXPERIMENTS, Claim
from megatron_fec.study.quantities import Curves
from megatron_fec.study.units import Record, Unit
from megatron_fec.study.verdicts import Verdict, judge

Runs = dict[str, dict[int, dict[str, Curves]]]  # bed -> seed -> variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    experiment: str
    claim: Claim
    bed: str
    seeds: tuple[int, ...]
    verdict: Verdict | None  # None where the runs it needs are not part of this study


def runs_of(records: Mapping[Unit, Record]) -> Runs:
    """The curves of all finished units."""
    runs: Runs = {}
    for unit, record in records.items():
        seeds = runs.setdefault(unit.bed, {})
        seeds.setdefault(unit.seed, {})[unit.variant] = Curves(rows=record.rows, total_steps=unit.steps)
    return runs


def results_of(names: Sequence[str], runs: Runs) -> list[Result]:
    """In the order of the experiments, of their claims, and of the claims' beds."""
    results = []
    for name in names:
        for claim in EXPERIMENTS[name].claims:
            for bed in claim.beds:
                seeds = {
                    s: curves
                    for s, curves in runs.get(bed, {}).items()
                    if claim.quantity.variants <= set(curves)
                }
                values = [claim.quantity.of(curves) for curves in seeds.values()]
                verdict = judge(values) if values else None
                results.append(
                    Result(experiment=name, claim=claim, bed=bed, seeds=tuple(seeds), verdict=verdict)
                )
    return results


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One object a result; `margin` is above 0 where the claim holds."""
    return [
        {
            "experiment": result.experiment,
            "claim": result.claim.text,
            "bed": result.bed,
            "unit": result.claim.unit,
            "seeds": list(result.seeds),
            "margin": None if result.verdict is None else asdict(result.verdict),
        }
        for result in results
    ]


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many claims reproduce, do not, are unclear, or were not run."""
    found: dict[str, int] = dict.fromkeys(("yes", "no", "unclear", "not run"), 0)
    for result in results:
        found["not run" if result.verdict is None else result.verdict.reproduces] += 1
    return found
