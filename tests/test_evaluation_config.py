"""The settings of an evaluation: the project's files, and what is wrong said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fec import cli
from megatron_fec.config import ConfigError
from megatron_fec.evaluation_config import load_evaluation

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PAPER, TINY = str(CONFIGS / "evaluation.yaml"), str(CONFIGS / "evaluation_tiny.yaml")
PLACE = ["model.path=m", "output_dir=o"]


def test_the_papers_benchmarks():
    config = load_evaluation(PAPER, PLACE)
    assert {name: one.samples for name, one in config.chosen.items()} == {
        "aime24": 32,
        "aime25": 32,
        "amc": 32,
        "math500": 4,
        "olympiadbench": 4,
        "gsm8k": 2,
    }
    rollout = config.rollout
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.responses_per_batch) == (
        0.7,
        0.8,
        20,
        256,
    )
    assert config.chosen["aime24"].ks == [1, 2, 4, 8, 16, 32]
    assert config.chosen["gsm8k"].answer_after == "####"
    assert config.chosen["olympiadbench"].source == "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train"
    assert {one.prompt_style for one in config.chosen.values()} == {"boxed"}


def test_the_embedded_task():
    config = load_evaluation(TINY)
    assert (config.model.path, config.rollout.engine, config.processes) == ("embedded", "native", 1)
    assert config.output_dir.startswith("runs/")
    assert list(config.chosen) == ["countdown"]


def test_only_chooses_in_the_order_of_the_file():
    config = load_evaluation(PAPER, [*PLACE, "only=[gsm8k,aime24]", "benchmarks.aime24.pass_at_k=[3,32]"])
    assert list(config.chosen) == ["aime24", "gsm8k"]
    assert [one.ks for one in config.chosen.values()] == [[3, 32], [1, 2]]


def test_a_benchmark_of_the_users_own():
    mine = ["benchmarks.mine.source=a.jsonl", "benchmarks.mine.samples=3", "benchmarks.aime24.source=b.jsonl"]
    config = load_evaluation(PAPER, [*PLACE, *mine])
    assert config.chosen["mine"].answer_column == "answer"
    assert (config.chosen["aime24"].source, config.chosen["aime24"].samples) == ("b.jsonl", 32)


def test_a_file_may_build_on_another(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(f"base: {PAPER}\nmodel: {{path: x}}\noutput_dir: y\nonly: [amc]\n")
    assert list(load_evaluation(tmp_path / "mine.yaml").chosen) == ["amc"]


def test_processes_are_those_of_the_engine():
    two = ["policy.tensor_parallel=2", "policy.pipeline_parallel=3"]
    assert load_evaluation(TINY, two).processes == 6
    assert load_evaluation(TINY, ["rollout.engine=vllm", "rollout.tensor_parallel=4"]).processes == 4


BAD = [
    (["only=[countdwn]"], "only=countdwn must be one of the benchmarks countdown. Did you mean countdown?"),
    (["only=countdown"], "only (in {file} or an override) must be a list, such as only=[a,b]."),
    (
        ["benchmarks.countdown.sample=3"],
        "benchmarks.countdown.sample is not a setting of an evaluation (in {file} or an override). "
        "Did you mean benchmarks.countdown.samples?",
    ),
    (["rollout.topp=1"], "rollout.topp is not a setting of an evaluation"),
    (["rollout.topp=1"], "Did you mean rollout.top_p?"),
    (["zzz=1"], "The settings are model.path, output_dir, policy.tensor_parallel"),
    (
        ["benchmarks.countdown.pass_at_k=[1,8]"],
        "benchmarks.countdown.pass_at_k=[1, 8]: k=8 must be between 1 and benchmarks.countdown.samples=4. "
        "Sample more or lower k.",
    ),
    (["benchmarks.countdown.pass_at_k=[0]"], "k=0 must be between 1 and"),
    (["benchmarks.countdown.samples=0"], "benchmarks.countdown.samples=0 must be at least 1."),
    (["benchmarks.new.samples=3"], "benchmarks.new.source is required; set it in {file} or as"),
    (["benchmarks.countdown=4"], "{file}: Merge error: int is not a subclass of BenchmarkConfig"),
    (
        ["benchmarks.a/b.source=c", "benchmarks.a/b.samples=1"],
        "benchmarks.a/b must be named by letters, digits",
    ),
    (["benchmarks.countdown.prompt_style=box"], "must be one of boxed, chat, plain. Did you mean boxed?"),
    (["rollout.engine=vlm"], "rollout.engine=vlm must be one of vllm, native. Did you mean vllm?"),
    (["policy.precision=fp16"], "policy.precision=fp16 must be one of bf16, fp32."),
    (["rollout.temperature=0"], "rollout.temperature=0.0 must be a finite number greater than 0."),
    (["rollout.temperature=nan"], "rollout.temperature=nan must be a finite number greater than 0."),
    (["verifier_timeout=-1"], "verifier_timeout=-1.0 must be a finite number greater than 0."),
    (["rollout.top_p=0"], "rollout.top_p=0.0 must be in (0, 1]."),
    (["rollout.top_p=1.1"], "rollout.top_p=1.1 must be in (0, 1]."),
    (["rollout.top_k=-1"], "rollout.top_k=-1 must be 0 (off) or more."),
    (["rollout.seed=-1"], "rollout.seed=-1 must be 0 or more."),
    (["rollout.responses_per_batch=0"], "rollout.responses_per_batch=0 must be at least 1."),
    (["rollout.gpu_memory_utilization=1.5"], "rollout.gpu_memory_utilization=1.5 must be in (0, 1]."),
    (["rollout.top_k=many"], "rollout.top_k in {file}: "),
    (["trainer.seed=1"], "trainer is not a setting of an evaluation"),
    (
        ["rollout.tensor_parallel=2"],
        "rollout.tensor_parallel=2 is not read by rollout.engine=native. Set policy.tensor_parallel instead.",
    ),
    (
        ["rollout.engine=vllm", "policy.pipeline_parallel=2"],
        "policy.pipeline_parallel=2 is not read by rollout.engine=vllm. Set rollout.tensor_parallel instead.",
    ),
    (["only"], "override 'only' must have the form key=value"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_what_is_wrong_is_said(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        load_evaluation(TINY, overrides)
    assert message.format(file=TINY) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_required():
    with pytest.raises(
        ConfigError, match=r"^model\.path is required; set it in .*evaluation\.yaml or as model\.path"
    ):
        load_evaluation(PAPER)
    with pytest.raises(ConfigError, match=r"^--config .*none\.yaml does not exist"):
        load_evaluation(CONFIGS / "none.yaml")


def test_no_benchmark_at_all(tmp_path: Path):
    (tmp_path / "none.yaml").write_text("model: {path: m}\noutput_dir: o\n")
    with pytest.raises(
        ConfigError, match=r"^benchmarks holds none\. Name one, such as benchmarks\.mine\.source"
    ):
        load_evaluation(tmp_path / "none.yaml")


# ------------------------------------------------------------------ the command


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["evaluate", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_the_command_refuses_before_it_starts_anything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "elastic_launch", None)  # not callable
    assert "Did you mean countdown?" in refusal("--config", TINY, "only=[countdow]")
    assert "model.path is required" in refusal("--processes", "2")


def test_the_command_starts_the_ranks_of_the_engine(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr(
        cli,
        "elastic_launch",
        lambda launch, _: lambda *command: started.append((launch.nproc_per_node, command)),
    )
    settings = ["policy.tensor_parallel=2", "rollout.seed=3"]
    assert CliRunner().invoke(cli.app, ["evaluate", "--config", TINY, *settings]).exit_code == 0
    arguments = ["evaluate", "--config", TINY, "--processes", "4", *settings]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert [count for count, _ in started] == [2, 4]
    script, *rest = started[0][1]
    assert Path(script).name == "evaluate.py" and Path(script).is_file()
    assert rest == ["--config", TINY, *settings]
