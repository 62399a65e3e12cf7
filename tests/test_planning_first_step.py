"""What a run's first step says beside its plan, on a known GPU and on others; a pure function of a row of metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fec.config import load_config
from megatron_fec.planning import assumptions
from megatron_fec.planning.command import find_model
from megatron_fec.planning.first_step import GIB, FirstStep, compare, no_note
from megatron_fec.planning.plan import Machine, lengths_of, make_plan
from megatron_fec.planning.table import plan_of

QWEN_32B = Path(__file__).resolve().parent.parent / "configs" / "qwen32b_id.yaml"
MEASURED = {
    "timers/generate": 100.0,
    "timers/train": 300.0,
    "timers/step": 500.0,
    "memory/reserved_gib/train": 50.0,
    "memory/allocated_gib/train": 40.0,
    "train_rollouts/response_length": 900.0,
}


def first_step(device_name: str) -> FirstStep:
    config = load_config(QWEN_32B)
    return FirstStep(
        config=config,
        hf_config=find_model(config)[0].hf_config,
        device_name=device_name,
        world_size=32,
        gpus_per_node=8,
        layers="transformer_engine",
    )


def test_planned_stands_beside_measured_with_the_ratio():
    plan = plan_of(QWEN_32B)
    heading, *lines = compare(plan, MEASURED)
    assert "planned, measured, ratio" in heading and "h100-80" in heading
    rows = {line.split("  ")[1].strip(): line.split() for line in lines}
    assert set(rows) == {"rollout", "training", "step", "memory, training"}
    training = plan.time.parts["training"]
    assert rows["training"][1:] == [f"{training:.1f}", "s", "300.0", "s", "x", f"{300 / training:.2f}"]
    memory = (plan.memory.total("training") - assumptions.CONTEXT) / GIB
    assert rows["memory, training"][2:] == [f"{memory:.1f}", "GiB", "50.0", "GiB", "x", f"{50 / memory:.2f}"]
    step = plan.time.total - plan.time.parts["checkpoint"]
    assert rows["step"][1] == f"{step:.1f}"


def test_the_plan_is_for_responses_as_long_as_they_were():
    beside_plan = first_step("NVIDIA H100 80GB HBM3")
    assert (
        beside_plan({"train_rollouts/response_length": 1.0}) is None
    )  # a row that was put off has no timers
    text = beside_plan(MEASURED)
    assert text is not None and beside_plan(MEASURED) is None
    config = load_config(QWEN_32B)
    model, _ = find_model(config)
    machine = Machine(gpu=plan_of(QWEN_32B).machine.gpu, nodes=4, gpus_per_node=8)
    assert text.splitlines() == compare(
        make_plan(config, model, machine, lengths_of(config, 900.0)), MEASURED
    )


@pytest.mark.parametrize("device_name", ["NVIDIA A100-SXM4-80GB", "cpu", ""])
def test_of_a_device_that_the_planner_does_not_know_nothing_is_said(device_name: str):
    assert first_step(device_name)(MEASURED) is None
    assert no_note(MEASURED) is None
