"""megatron-fec plan: a configuration, nodes and a GPU -> its plan on the terminal, and an exit code."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_fec.config import Config, ConfigError, load_config
from megatron_fec.dry_run import published_or_found
from megatron_fec.planning.gpus import find_gpu
from megatron_fec.planning.layouts import all_layouts
from megatron_fec.planning.limits import scaling
from megatron_fec.planning.page import print_plan
from megatron_fec.planning.plan import Machine, Model, check_layout, lengths_of, make_plan, starving
from megatron_fec.planning.shape import shape_of
from megatron_fec.precision_rules import check_gpu, check_rollout_gpu

FITS, DOES_NOT_FIT = 0, 1  # exit codes; a mistake is 2, as everywhere
NODES_LINE = re.compile(r"^# nodes: (\d+)$", re.MULTILINE)


def run_plan(
    path: Path,
    overrides: list[str],
    *,
    nodes: int | None = None,
    gpu: str = "h100-80",
    gpus_per_node: int = 8,
    price: float | None = None,
    response_tokens: float | None = None,
    shows_all: bool = False,
) -> int:
    """Prints the plan; FITS or DOES_NOT_FIT. ConfigError for a mistake, in the run's own words where the run has them."""
    config = load_config(path, overrides)
    found = find_gpu(gpu)
    check_gpu(config.policy.precision, capability=found.capability)
    check_rollout_gpu(config.rollout.precision, config.policy.precision, capability=found.capability)
    machine = Machine(
        gpu=found,
        nodes=_positive("--nodes", stated_nodes(path) if nodes is None else nodes),
        gpus_per_node=_positive("--gpus-per-node", gpus_per_node),
    )
    if price is not None and not price > 0:
        raise ConfigError(f"--price {price:g} must be greater than 0: dollars of one GPU for one hour.")
    lengths = lengths_of(config, response_tokens)
    model, source = find_model(config)
    check_layout(config, model.hf_config, world_size=machine.world_size)
    plan = make_plan(config, model, machine, lengths)
    if starved := starving(config, world_size=machine.world_size):
        plan.obstacles.append(starved)
    print_plan(
        plan,
        model,
        lengths,
        all_layouts(config, model, machine, lengths),
        scaling(config, model, machine, lengths),
        price=found.price if price is None else price,
        source=source,
        shows_all=shows_all,
    )
    return FITS if plan.fits else DOES_NOT_FIT


def find_model(config: Config) -> tuple[Model, str]:
    """The checkpoint's sizes, and where they came from."""
    hf_config, source = published_or_found(config)
    if hf_config is None:
        raise ConfigError(source)
    return Model(
        hf_config=hf_config, shape=shape_of(hf_config)
    ), "published sizes" if source else "its config.json"


def stated_nodes(path: Path) -> int:
    """The number in a configuration's line `# nodes: N`; 1 without it."""
    if not path.is_file():
        raise ConfigError(f"--config {path} does not exist. The project's own are in configs/.")
    found = NODES_LINE.search(path.read_text())
    return int(found[1]) if found else 1


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} {value} must be at least 1.")
    return value
