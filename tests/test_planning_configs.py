"""Every training file in configs/ fits at its own nodes, passes the dry run, and says of itself what the planner says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_configs import NO_RUN

from megatron_fec.config import load_config
from megatron_fec.dry_run import dry_run_text
from megatron_fec.planning.command import FITS, find_model, run_plan, stated_nodes
from megatron_fec.planning.table import (
    CONFIGS,
    DOCUMENTS,
    GPUS_PER_NODE,
    ROOT,
    model_table,
    plan_of,
    planned_configs,
    planned_line,
    replace_table,
)

TRAINING = sorted(path for path in CONFIGS.glob("*.yaml") if path.name not in NO_RUN)
LARGE_MODELS = {
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen2.5-72B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-235B-A22B",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
}
REFRESH = "run: .venv/bin/python -m megatron_fec.planning.table"


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_every_configuration_fits_and_passes_the_dry_run(path: Path):
    plan = plan_of(path)
    assert plan.obstacles == []
    text = dry_run_text(load_config(path), nodes=stated_nodes(path), gpus_per_node=GPUS_PER_NODE)
    assert f"{plan.machine.world_size} ranks" in text
    assert "# memory of each GPU" in text


@pytest.mark.parametrize("path", planned_configs(), ids=lambda path: path.stem)
def test_a_file_says_of_itself_what_the_planner_says(path: Path):
    assert planned_line(plan_of(path)) in path.read_text().splitlines(), REFRESH


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_table_is_the_planners(document: Path):
    text = document.read_text()
    assert replace_table(text, model_table()) == text, REFRESH


def test_the_example_is_part_of_the_output(capsys: pytest.CaptureFixture[str]):
    _, example = DOCUMENTS[0].read_text().split("## Example")
    [name] = re.findall(r"megatron-fec plan configs/(\S+)`", example)
    run_plan(CONFIGS / name, [])
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    lines = example.split("```")[1].strip("\n").splitlines()
    assert len(lines) > 20 and [line for line in lines if line not in printed] == []


def test_every_model_of_the_table_has_a_file():
    assert {load_config(path).model.path for path in planned_configs()} >= LARGE_MODELS
    assert all(find_model(load_config(path))[0].shape.parameters > 1e9 for path in planned_configs())


def test_the_nodes_of_a_launcher_are_those_of_its_file():
    for script in (ROOT / "slurm").glob("train_*.sh"):
        text = script.read_text()
        [config] = re.findall(r"CONFIG=\$\{CONFIG:-(.*)\}", text)
        [nodes] = re.findall(r"^#SBATCH --nodes=(\d+)$", text, re.MULTILINE)
        assert stated_nodes(ROOT / config) == int(nodes)


def test_two_nodes_hold_the_32b_run_as_its_launcher_says(capsys: pytest.CaptureFixture[str]):
    assert run_plan(CONFIGS / "qwen32b_id.yaml", [], nodes=2) == FITS
    assert "verdict: fits" in capsys.readouterr().out
