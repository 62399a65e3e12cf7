"""The results of an evaluation: numbers of each benchmark, as JSON, as a markdown table and as one for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from megatron_fec.evaluate import Estimate, estimates
from megatron_fec.evaluation_config import EvaluationConfig
from megatron_fec.evaluation_files import Generation, write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """Rates are shares of all responses."""

    name: str
    problems: int
    prompts_too_long: int  # problems that were left out
    samples: int  # responses a problem
    mean_at_k: Estimate  # k is `samples`
    pass_at_k: dict[int, Estimate]
    truncated: float
    response_tokens: float  # mean
    verifier_timeouts: int  # responses
    verifier_crashes: int


def result_of(
    name: str, generations: Sequence[Generation], *, samples: int, ks: Sequence[int], num_too_long: int
) -> BenchmarkResult:
    """The result of a complete list of generations, in order."""
    groups = [generations[i : i + samples] for i in range(0, len(generations), samples)]
    found = estimates([[one.reward for one in group] for group in groups], ks)
    return BenchmarkResult(
        name=name,
        problems=len(groups),
        prompts_too_long=num_too_long,
        samples=samples,
        mean_at_k=found[f"mean_at_k/{samples}"],
        pass_at_k={k: found[f"pass_at_k/{k}"] for k in ks},
        truncated=sum(one.truncated for one in generations) / len(generations),
        response_tokens=sum(one.tokens for one in generations) / len(generations),
        verifier_timeouts=sum(one.verdict == "timeout" for one in generations),
        verifier_crashes=sum(one.verdict == "crash" for one in generations),
    )


def write_results(folder: Path, config: EvaluationConfig, results: Sequence[BenchmarkResult]) -> None:
    """results.json, and the same as a table in results.md."""
    page = {
        "model": config.model.path,
        "precision": config.policy.precision,
        "rollout": asdict(config.rollout),
        "benchmarks": {one.name: {k: v for k, v in asdict(one).items() if k != "name"} for one in results},
    }
    write_whole(folder / "results.json", json.dumps(page, indent=1) + "\n")
    headings, rows = table(results)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_whole(folder / "results.md", f"{text}\n{_caption(config)}\n")


def table(results: Sequence[BenchmarkResult]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows in percent; a k that a benchmark does not have is a dash."""
    ks = sorted({k for one in results for k in one.pass_at_k})
    headings = ["benchmark", "problems", "n", "mean@n", *(f"pass@{k}" for k in ks), "truncated", "tokens"]
    headings += ["no verdict", "too long"]
    rows = [
        [
            one.name,
            str(one.problems),
            str(one.samples),
            _cell(one.mean_at_k),
            *(_cell(one.pass_at_k[k]) if k in one.pass_at_k else "-" for k in ks),
            f"{100 * one.truncated:.1f} %",
            f"{one.response_tokens:.0f}",
            str(one.verifier_timeouts + one.verifier_crashes),
            str(one.prompts_too_long),
        ]
        for one in results
    ]
    return headings, rows


def terminal_table(results: Sequence[BenchmarkResult]) -> Table:
    """One line a quantity and one column a benchmark, which fits a terminal."""
    headings, rows = table(results)
    shown = Table(caption="percent, with 95 % confidence intervals")
    shown.add_column(headings[0])
    for row in rows:
        shown.add_column(row[0], justify="right")
    for index, heading in enumerate(headings[1:], start=1):
        shown.add_row(heading, *(row[index] for row in rows))
    return shown


def _cell(one: Estimate) -> str:
    return f"{100 * one.value:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _caption(config: EvaluationConfig) -> str:
    rollout = config.rollout
    return (
        f"{config.model.path}, {rollout.engine}, temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, "
        f"top-k {rollout.top_k}, at most {rollout.max_response_tokens} response tokens. Percent, with 95 % confidence "
        "intervals over problems; a response without a verdict counts as wrong."
    )
