"""Replay: the numbers of training come back from a dump, other strategies from their definitions; bad calls are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import reference
import torch
from dump_fixtures import LENGTHS, SETTINGS, TOKENS, Trained, trained_step, write_dump
from typer.testing import CliRunner

from megatron_fec import cli
from megatron_fec.algorithm.losses import ADDITIONS, MARKS, POLICY_LOSSES
from megatron_fec.algorithm.options import defaults_of
from megatron_fec.algorithm.strategies import marks_of
from megatron_fec.config import AlgorithmConfig, ConfigError, ScheduleConfig, ThresholdsConfig
from megatron_fec.dump_reader import DumpedUpdate, read_dump
from megatron_fec.metrics import MetricSums
from megatron_fec.replay import (
    CLASSES,
    Replay,
    Strategy,
    aggregated,
    clip_range,
    default_strategies,
    parse_strategy,
    run_replay,
)
from megatron_fec.replay_output import write_replay
from megatron_fec.rollout_dump import VERSION_KEY
from megatron_fec.token_loss import policy_token_loss

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def step() -> list[Trained]:
    return trained_step()


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory, step: list[Trained]) -> Path:
    folder = tmp_path_factory.mktemp("run") / "dumps"
    write_dump(folder, step)
    return folder


def metrics_of(dumps: Path, *texts: str) -> dict[str, float]:
    (result,) = run_replay(dumps, texts).results
    return result.metrics()


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_replay_of_the_run_s_own_strategy_gives_the_numbers_of_training(
    tmp_path: Path, step: list[Trained], aggregation: str
) -> None:
    algorithm = AlgorithmConfig(
        schedule=ScheduleConfig(name="did", total_steps=1),
        thresholds=ThresholdsConfig(eps_std=0.15, upper=[-0.2, 0.45], lower=[-0.1, 0.28]),
        policy_loss="clip",
        options={"dual_clip": 1.5},
        aggregation=aggregation,
    )
    total: MetricSums | None = None
    for one in step:
        loss = policy_token_loss(
            algorithm, SETTINGS.weights, max_response_tokens=16, context_group=None, seed=one.seed
        )
        output = loss(one.stats, one.micro_batch)
        sums = output.metrics.with_pair("loss", (output.loss_sum, output.count))
        total = sums if total is None else total + sums
    assert total is not None
    write_dump(tmp_path, step, aggregation=aggregation)
    replayed = run_replay(tmp_path, []).results[0]
    assert replayed.strategy.label == "as trained: clip@did"
    got, trained = replayed.metrics(), total.means()
    assert trained["clip_fraction_upper"] > 0 and trained["dual_clip_fraction"] > 0
    assert len(trained) > 40
    for name, value in trained.items():
        assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def response_rows(step: list[Trained]) -> list[dict[str, float]]:
    rows = []
    for one in step:
        batch = one.micro_batch
        assert batch.old_logprobs is not None and one.stats.alignment is not None
        columns = {
            "lp": one.stats.logprobs,
            "old": batch.old_logprobs,
            "a": batch.advantages,
            "alignment": one.stats.alignment,
        }
        for t in batch.response_mask.nonzero()[:, 0].tolist():
            rows.append({name: values[t].item() for name, values in columns.items()})
    return rows


@pytest.mark.parametrize(
    ("text", "weights", "dual_clip"),
    [
        ("clip@grpo,eps_std=0.2,upper=[-0.25,0.5],lower=[-0.13,0.3]", (0.0, 0.0), 1.5),
        ("clip@dynamic_upper,eps_std=0.2,upper=[-0.25,0.5],lower=[-0.13,0.3]", (1.0, 0.0), 1.5),
        (
            "clip@dynamic_lower,dual_clip=null,eps_std=0.2,upper=[-0.25,0.5],lower=[-0.13,0.3]",
            (0.0, 1.0),
            None,
        ),
        ("clip@0.25/0.5,dual_clip=4,eps_std=0.2,upper=[-0.25,0.5],lower=[-0.13,0.3]", (0.25, 0.5), 4.0),
    ],
)
def test_clip_against_the_float64_reference(
    dumps: Path, step: list[Trained], text: str, weights: tuple[float, float], dual_clip: float | None
) -> None:
    loss = change = kept = cut_up = cut_down = 0.0
    rows = response_rows(step)
    for row in rows:
        bounds = reference.bounds(math.exp(row["lp"]), *weights)
        value, gradient = reference.clip_loss(row["lp"], row["old"], row["a"], *bounds, dual_clip)
        loss += value
        change -= gradient * row["alignment"]
        kept += gradient != 0
        cut_up += gradient == 0 and row["a"] > 0
        cut_down += gradient == 0 and row["a"] < 0
    got = metrics_of(dumps, text)
    assert len(rows) == TOKENS and cut_up and cut_down
    assert got["loss"] == pytest.approx(loss / TOKENS, rel=1e-5)
    assert got["dH/predicted"] == pytest.approx(change / TOKENS, rel=1e-4, abs=1e-8)
    assert (got["kept"], got["cut_positive"], got["cut_negative"]) == pytest.approx(
        (kept / TOKENS, cut_up / TOKENS, cut_down / TOKENS)
    )


def test_gradient_norms_are_those_of_the_logits(dumps: Path, step: list[Trained]) -> None:
    squares = {name: 0.0 for name in ("all", *CLASSES)}  # noqa: C420 - whose keys pyright takes for literals
    for one in step:
        batch, logprobs = one.micro_batch, one.stats.logprobs
        assert batch.old_logprobs is not None
        ratio = (logprobs - batch.old_logprobs).exp()
        loss = torch.where(batch.response_mask, -batch.advantages * ratio, 0.0).sum()
        (gradient,) = torch.autograd.grad(loss, one.logits, retain_graph=True)
        for t in batch.response_mask.nonzero()[:, 0].tolist():
            p, r, a = logprobs[t].exp().item(), ratio[t].item(), batch.advantages[t].item()
            name = "none"
            if (a > 0 and 1 < r < 1.3) or (a < 0 and 0.7 < r < 1):
                name = {(1, 1): "E1", (1, 0): "E2", (0, 1): "E3", (0, 0): "E4"}[a > 0, p > 0.7]
                name = "none" if 0.3 < p <= 0.7 else name
            size = gradient[t].double().square().sum().item()
            squares["all"] += size
            squares[name] += size
    got = metrics_of(dumps, "clip@1/1,upper=[0,1e9],lower=[0,0.999],dual_clip=null")
    for name, square in squares.items():
        assert got[f"grad_norm/{name}"] == pytest.approx(math.sqrt(square / TOKENS), rel=1e-4), name
    assert math.fsum(got[f"grad_norm/{n}"] ** 2 for n in CLASSES) == pytest.approx(got["grad_norm/all"] ** 2)
    assert math.fsum(got[f"tokens/{name}"] for name in CLASSES) == pytest.approx(1)
    assert sum(square > 0 for square in squares.values()) >= 5


def test_tokens_are_marked_over_the_whole_update_with_the_run_s_seed(
    dumps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    original = DumpedUpdate.tokens

    def watched(self: DumpedUpdate, bounds: Any) -> Any:
        tokens = original(self, bounds)
        seen.append((len(tokens.logprobs), tokens.seed))
        return tokens

    monkeypatch.setattr(DumpedUpdate, "tokens", watched)
    text = "kl_cov,kl_cov_share=0.2,kl_cov_coef=2"
    got = metrics_of(dumps, text)
    half = sum(LENGTHS[i] for i in (0, 2, 4, 7))
    assert seen == [(half, 1000), (sum(LENGTHS) - half, 1001), (half, 1002), (sum(LENGTHS) - half, 1003)]
    marks = marks_of("kl_cov", {"kl_cov_share": 0.2})
    assert marks is not None
    loss = 0.0
    for update in read_dump(dumps / "step_000010").updates:
        chosen = marks(original(update, update.bounds(SETTINGS.weights, SETTINGS.lines))) > 0
        assert int(chosen.sum()) == max(int(0.2 * len(chosen)), 1)
        distance = (update.logprobs - update.old_logprobs).double()
        losses = -update.advantages * distance.exp() + torch.where(chosen, 2 * distance.abs(), 0.0)
        loss += losses.sum().item()
    assert got["loss"] == pytest.approx(loss / TOKENS, rel=1e-5)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_policy_loss_can_be_replayed(dumps: Path, name: str) -> None:
    options = {"region": ",region=E2", "archer": ",archer_kl_coef=0"}
    got = metrics_of(dumps, name + options.get(name, ""))
    assert all(math.isfinite(value) for value in got.values())
    assert got["kept"] > 0.1 and got["grad_norm/all"] > 0
    assert got["kept"] + got["cut_positive"] + got["cut_negative"] == pytest.approx(1)


def test_the_layout_that_wrote_a_dump_does_not_matter(
    tmp_path: Path, step: list[Trained], dumps: Path
) -> None:
    write_dump(tmp_path, [dataclasses.replace(one, rank=0) for one in reversed(step)], parts=1)
    texts = [
        "clip",
        "gspo",
        "clip_cov,clip_cov_low=-1,clip_cov_share=0.1",
        "clip,aggregation=seq_mean_token_mean",
    ]
    write_dump(tmp_path / "split", [half for one in step for half in halves(one)])
    expected, *others = [
        run_replay(folder, texts).results for folder in (dumps, tmp_path, tmp_path / "split")
    ]
    for other in others:
        assert [result.metrics() for result in other] == [result.metrics() for result in expected]
        assert [result.updates for result in other] == [result.updates for result in expected]


def halves(one: Trained) -> list[Trained]:
    """The micro-batch on two context ranks: each holds every other token of every sequence."""
    batch = one.micro_batch
    is_even = torch.arange(len(batch.labels)) % 2 == 0
    parts = [(0, batch.response_mask & is_even), (1, batch.response_mask & ~is_even)]
    return [
        dataclasses.replace(one, rank=rank, micro_batch=dataclasses.replace(batch, response_mask=mask))
        for rank, mask in parts
    ]


def test_steps_add_up(tmp_path: Path, step: list[Trained], dumps: Path) -> None:
    for number in (3, 11):
        write_dump(tmp_path / "dumps", step, step=number)
    replay = run_replay(tmp_path, ["clip"])
    assert (replay.steps, replay.tokens) == ([3, 11], 2 * TOKENS)
    assert replay.results[0].metrics() == pytest.approx(metrics_of(dumps, "clip"))
    assert [(row["step"], row["update"]) for row in replay.results[0].updates] == [
        (number, update) for number in (3, 11) for update in range(4)
    ]


def test_a_strategy_keeps_the_run_s_options_unless_it_sets_them(dumps: Path) -> None:
    own = metrics_of(dumps, "clip")
    assert own == metrics_of(dumps, "clip@0.75/0.1,dual_clip=1.5,eps_std=0.15,aggregation=token_mean")
    assert own["dual_clip_fraction"] > metrics_of(dumps, "clip,dual_clip=null")["dual_clip_fraction"] == 0
    assert own["loss"] != metrics_of(dumps, "clip,aggregation=seq_mean_token_mean")["loss"]


def test_the_default_compares_the_run_with_constant_schedules() -> None:
    labels = [one.label for one in default_strategies(SETTINGS)]
    assert labels == ["as trained: clip@did", "clip@grpo", "clip@dynamic_upper", "clip@dynamic_lower"]
    added = dataclasses.replace(SETTINGS, policy_loss="clip+entropy_bonus")
    assert default_strategies(added)[1].policy_loss == "clip+entropy_bonus"
    rangeless = dataclasses.replace(SETTINGS, policy_loss="cispo", schedule="grpo")
    assert [one.label for one in default_strategies(rangeless)][:2] == ["as trained: cispo@grpo", "clip@grpo"]


def test_a_strategy_is_spelled_in_one_text() -> None:
    text = "clip+entropy_bonus@0.5/-1,entropy_coef=1e-3,upper=[0,0.28],dual_clip=null"
    strategy = parse_strategy(text)
    assert strategy == Strategy(
        label=text,
        policy_loss="clip+entropy_bonus",
        options={"entropy_coef": 1e-3, "upper": [0, 0.28], "dual_clip": None},
        weights=strategy.weights,
    )
    assert strategy.weights is not None
    assert (strategy.weights.upper, strategy.weights.lower) == (0.5, -1.0)
    assert parse_strategy("clip").weights is None


def test_the_options_of_a_replay_are_no_options_of_a_strategy() -> None:
    own = set(defaults_of(clip_range)) | set(defaults_of(aggregated))
    tables: list[dict[str, Any]] = [POLICY_LOSSES, MARKS, ADDITIONS]
    assert own == {"eps_std", "upper", "lower", "aggregation"}
    assert [name for table in tables for name, f in table.items() if own & set(defaults_of(f))] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clp", r"--strategy clp: policy_loss=clp must be one of .* Did you mean clip\?"),
        ("clip+entropy", r"addition=entropy must be one of .* Did you mean entropy_bonus\?"),
        ("clip@dynamic", r"@dynamic must be one of grpo, static, .* or two weights such as @0.5/0"),
        ("clip@1/2/3", r"@1/2/3 must be one of"),
        ("cispo@grpo", r"cispo has no clip range, so @grpo would do nothing. Leave it out."),
        ("cispo,upper=[0,0.2]", r"option.upper is not read by cispo"),
        ("cispo,ratio_mxa=2", r"option.ratio_mxa is not read by cispo .* Did you mean ratio_max\?"),
        ("clip,dual_clip=0.5", r"option.dual_clip=0.5 must be greater than 1"),
        ("clip,eps_std=1.5", r"option.eps_std=1.5 must be between 0 and 1"),
        ("clip,upper=[1]", r"option.upper=\[1\] must be \[slope, intercept\]"),
        ("clip,lower=[0.5,0.6]", r"option.lower=\[0.5, 0.6\] must be .* in \(0, 1\)"),
        ("clip,aggregation=mean", r"option.aggregation=mean must be one of token_mean"),
        ("clip,dual_clip", r"'dual_clip' must have the form option=value"),
        ("clip,dual_clip=[", r"must have the form option=value"),
        ("clip,a.b=1", r"'a.b=1' must have the form option=value"),
        ("region", r"option.region is required by region"),
        ("", r"policy_loss= must be one of"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_strategy(text)


def test_a_loss_that_misses_a_column_says_so(dumps: Path) -> None:
    with pytest.raises(ConfigError, match=r"--strategy clip\+kl: kl needs LossInputs.reference_logprobs"):
        run_replay(dumps, ["clip+kl"])


@pytest.fixture(scope="module")
def written(dumps: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Replay, Path]:
    replay = run_replay(dumps, ["clip@grpo", "cispo"])
    folder = tmp_path_factory.mktemp("out") / "new"
    write_replay(replay, folder)
    return replay, folder


def test_json_holds_every_number_and_the_plot_is_a_picture(written: tuple[Replay, Path]) -> None:
    replay, folder = written
    content = json.loads((folder / "replay.json").read_text())
    assert (content["schema_version"], content["steps"], content["tokens"]) == (1, [10], TOKENS)
    assert content["settings"]["weights"] == {"upper": 0.75, "lower": 0.1}
    first, second = content["strategies"]
    assert first["label"] == "clip@grpo" and second["policy_loss"] == "cispo"
    assert first["metrics"] == replay.results[0].metrics()
    assert [row["update"] for row in first["updates"]] == [0, 1, 2, 3]
    assert first["updates"][3]["cut_negative"] > 0 == second["updates"][3]["cut_negative"]
    assert first["updates"][0]["weight_upper"] == 0 and second["updates"][0]["weight_upper"] == 0.75
    assert (folder / "replay.png").read_bytes().startswith(b"\x89PNG")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["replay", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_table_and_names_its_files(dumps: Path, tmp_path: Path) -> None:
    code, out, _ = run(dumps, "--output", tmp_path / "out", "--strategy", "clip@grpo", "--strategy", "cispo")
    assert code == 0
    for text in ("clip@grpo", "cispo", "98 tokens of 1 step", "dH predicted", "gradient norm, E4", "kept, %"):
        assert text in out
    assert out.endswith(f"replay      {tmp_path}/out/replay.json, {tmp_path}/out/replay.png\n")
    assert "skipped" not in out


def spoil(dumps: Path, column: str, value: object) -> None:
    path = dumps / "step_000010" / "rank_0.parquet"
    table = pq.read_table(path)
    columns = table.to_pydict()
    columns[column][2] = value
    pq.write_table(table.from_pydict(columns, schema=table.schema), path)


def test_wrong_calls_end_in_one_line(dumps: Path, tmp_path: Path, step: list[Trained]) -> None:
    write_dump(tmp_path / "empty", [])
    write_dump(tmp_path / "spoiled", step)
    spoil(tmp_path / "spoiled", "logprob", math.nan)
    for arguments, expected in (
        ((tmp_path / "nowhere",), "nowhere holds no dump"),
        ((tmp_path / "empty",), "empty holds no response token"),
        ((dumps, "--strategy", "clpi"), "policy_loss=clpi must be one of"),
        ((dumps, "--strategy", "clip,ratio_max=2"), "option.ratio_max is not read by clip"),
        ((tmp_path / "spoiled",), "has 1 corrupt rows or files: rank_0.parquet row 2: logprob=nan"),
        ((dumps, "--output", dumps / "step_000010" / "rank_0.parquet"), "File exists"),
    ):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        assert err.startswith("error: ") and expected in err


def test_another_schema_version_ends_in_one_line(tmp_path: Path, step: list[Trained]) -> None:
    path = write_dump(tmp_path, step) / "rank_0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, VERSION_KEY: b"7"}), path)
    code, _, err = run(tmp_path, "--skip-corrupt")
    assert code == 2 and "has schema version 7, and this megatron-fec reads version 1" in err


def test_corrupt_rows_are_skipped_when_asked_and_counted(tmp_path: Path, step: list[Trained]) -> None:
    write_dump(tmp_path / "dumps", step)
    spoil(tmp_path / "dumps", "entropy", -1.0)
    code, out, _ = run(tmp_path / "dumps", "--skip-corrupt", "--output", tmp_path / "out")
    assert code == 0
    line = "skipped 1 corrupt rows or files: step_000010/rank_0.parquet row 2: entropy=-1.0 must be finite and 0 or more"
    assert line in out
    content = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert content["tokens"] == TOKENS - 1 and len(content["faults"]) == 1


def test_replay_needs_neither_megatron_nor_an_engine() -> None:
    code = "import sys, megatron_fec.replay_output; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    heavy = {"megatron", "mbridge", "vllm", "transformers", "datasets"}
    assert not heavy & {name.split(".")[0] for name in out.split()}
