"""The commands a person types: what is wrong is said in one line, with exit code 2 and without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fec import cli

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs" / "tiny_cpu.yaml")


COMMANDS = ("quickstart", "train", "evaluate", "convert", "report", "replay", "doctor", "study")


def refusal(*arguments: str) -> str:
    """The one line of a command that a user's mistake ends."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def make_run(folder: Path, *, schedule: str, rewards: list[float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"algorithm: {{schedule: {{name: {schedule}}}}}\ntrainer: {{max_steps: 2}}\n"
    )
    rows = [{"step": step, "train_rollouts/reward": reward} for step, reward in enumerate(rewards)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("processes were about to be started")

    monkeypatch.setattr(cli, "elastic_launch", fail)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--config", TINY, "polcy.tensor_parallel=2"], "Did you mean policy?"),
        (["train", "--config", TINY, "trainer.max_step=2"], "Did you mean trainer.max_steps?"),
        (
            ["train", "--config", TINY, "trainer.max_steps=81"],
            "algorithm.schedule.total_steps=80 must be at least",
        ),
        (["train", "--config", TINY, "trainer.max_steps=two"], "trainer.max_steps in "),
        (["train", "--config", TINY, "[red]"], "override '[red]' must have the form key=value"),
        (["train", "--config", "configs/none.yaml"], "--config configs/none.yaml does not exist"),
    ],
)
def test_train_refuses_before_it_starts_anything(arguments: list[str], expected: str):
    assert expected in refusal(*arguments)


@pytest.mark.usefixtures("no_launch")
def test_quickstart_names_the_nearest_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "vllm_is_available", lambda: True)
    finished = tmp_path / "quickstart_dyd" / "hf"
    finished.mkdir(parents=True)
    line = refusal("quickstart", "--schedule", "dyd", "--runs", str(tmp_path))
    assert "algorithm.schedule.name=dyd must be one of grpo, static" in line
    assert "Did you mean did?" in line
    assert finished.is_dir()  # a mistake moves no run out of the way


def test_report_of_a_folder_that_is_no_run(tmp_path: Path):
    line = refusal("report", str(tmp_path), "--output", str(tmp_path / "report.html"))
    assert f"{tmp_path} is not a run folder: it holds no metrics.jsonl" in line
    assert not (tmp_path / "report.html").exists()


def test_report_of_a_run_with_a_broken_row(tmp_path: Path):
    run = make_run(tmp_path / "a", schedule="id", rewards=[0.1])
    (run / "metrics.jsonl").write_text("{}\n")
    assert "metrics.jsonl line 1 is not a metrics row" in refusal("report", str(run))


def test_report_that_cannot_be_written(tmp_path: Path):
    run = make_run(tmp_path / "a", schedule="id", rewards=[0.1])
    assert "File exists" in refusal("report", str(run), "--output", str(run / "config.yaml" / "report.html"))


def test_report_of_two_runs_is_one_page_that_needs_nothing_else(tmp_path: Path):
    runs = [
        str(make_run(tmp_path / "a", schedule="id", rewards=[0.1, 0.4])),
        str(make_run(tmp_path / "b", schedule="grpo", rewards=[0.2, 0.3])),
    ]
    output = tmp_path / "page" / "report.html"
    result = CliRunner().invoke(cli.app, ["report", *runs, "--output", str(output)])
    assert (result.exit_code, result.stdout) == (0, f"report      {output}\n")
    assert list(output.parent.iterdir()) == [output]
    page = output.read_text()
    assert "a (id)" in page
    assert "b (grpo)" in page
    assert page.count("<img ") == 1
    assert 'src="data:image/svg+xml;base64,' in page
    assert "http" not in page.replace("https://arxiv.org", "")


def test_convert_of_a_folder_that_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "be_one_rank", lambda: None)  # it sets variables of this process
    line = refusal("convert", str(tmp_path / "run" / "checkpoints" / "step_000001"), str(tmp_path / "out"))
    assert f"is not RUN/checkpoints/step_NNNNNN of a run: {tmp_path / 'run'} has no config.yaml" in line
    assert not (tmp_path / "out").exists()


def test_convert_replaces_no_folder_that_holds_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "be_one_rank", lambda: None)
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    line = refusal("convert", str(tmp_path / "run" / "checkpoints" / "step_000001"), str(tmp_path / "out"))
    assert "out is not empty. Name a new folder" in line
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_without_a_command_the_help_names_them_all():
    result = CliRunner().invoke(cli.app, [])
    assert all(f" {name} " in result.output for name in COMMANDS)
