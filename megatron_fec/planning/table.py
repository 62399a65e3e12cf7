"""The table of models in README.md and docs/planning.md, and each configuration's `# planned:` line, from the planner.

    .venv/bin/python -m megatron_fec.planning.table

rewrites them in the repository; tests/test_planning_configs.py fails where they are not what the planner says.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_fec.config import load_config
from megatron_fec.planning.command import find_model, stated_nodes
from megatron_fec.planning.gpus import find_gpu
from megatron_fec.planning.layouts import name_of
from megatron_fec.planning.plan import Machine, Plan, lengths_of, make_plan
from megatron_fec.policy.sizes import data_parallel_size

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DOCUMENTS = (ROOT / "docs" / "planning.md", ROOT / "README.md")
GPU, GPUS_PER_NODE = "h100-80", 8
PLANNED = re.compile(r"^# planned: .*$", re.MULTILINE)
HEADINGS = ("model", "configuration", "nodes x GPUs", "layout", "fullest GPU", "a step", "run or planned")
# Run on CPU, at every commit; all else is planned only.
TINY_ROW = "| 0.16 M Qwen2, embedded | `configs/tiny_cpu.yaml` | 2 CPU processes | TP2 | - | - | run |"


def planned_configs() -> list[Path]:
    """One for each model and precision: those whose first lines name a number of nodes."""
    return sorted(
        (path for path in CONFIGS.glob("*.yaml") if PLANNED.search(path.read_text())),
        key=lambda path: (find_model(load_config(path))[0].shape.parameters, path.name),
    )


def plan_of(path: Path) -> Plan:
    """On the file's own number of nodes."""
    config = load_config(path)
    model, _ = find_model(config)
    machine = Machine(gpu=find_gpu(GPU), nodes=stated_nodes(path), gpus_per_node=GPUS_PER_NODE)
    return make_plan(config, model, machine, lengths_of(config))


def planned_line(plan: Plan) -> str:
    """What a configuration says of itself."""
    return f"# planned: {_gigabytes(plan)} of an {GPU}, {_seconds(plan)} a step (docs/planning.md)"


def model_table() -> list[str]:
    """Markdown, smallest model first."""
    rows = [_row(path, plan_of(path)) for path in planned_configs()]
    rule = "|" + "---|" * len(HEADINGS)
    return [f"| {' | '.join(HEADINGS)} |", rule, TINY_ROW, *rows]


def replace_table(text: str, table: list[str]) -> str:
    """The document with its table of models exchanged."""
    start = text.index(f"| {HEADINGS[0]} | {HEADINGS[1]} |")
    end = text.index("\n\n", start)
    return text[:start] + "\n".join(table) + text[end:]


def refresh() -> None:
    """Writes every line and both tables anew."""
    for path in planned_configs():
        path.write_text(PLANNED.sub(planned_line(plan_of(path)), path.read_text()))
    for document in DOCUMENTS:
        document.write_text(replace_table(document.read_text(), model_table()))


def _row(path: Path, plan: Plan) -> str:
    policy, machine = plan.config.policy, plan.machine
    layout = f"{name_of(policy)}, DP{data_parallel_size(policy, machine.world_size)}"
    cells = (
        plan.config.model.path.split("/")[-1]
        + ("" if policy.precision == "bf16" else f", {policy.precision}"),
        f"`configs/{path.name}`",
        f"{machine.nodes} x {machine.gpus_per_node} {GPU}",
        layout,
        f"{_gigabytes(plan)}, {plan.memory.fullest}",
        _seconds(plan),
        "planned",
    )
    return f"| {' | '.join(cells)} |"


def _gigabytes(plan: Plan) -> str:
    return f"{plan.fullest_bytes / 1e9:.0f} GB"


def _seconds(plan: Plan) -> str:
    return f"{plan.time.total:.0f} s"


if __name__ == "__main__":
    refresh()
