"""Every layout of the policy on given GPUs: which fit, by planned time, and why each other one does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_fec.config import Config, ConfigError, PolicyConfig
from megatron_fec.planning.lengths import Lengths
from megatron_fec.planning.plan import Machine, Model, Plan, check_layout, make_plan, starving
from megatron_fec.policy_options import options_of_policy

SIZES = (1, 2, 4, 8)  # of TP and CP
RECOMPUTE = ("none", "selective", "full")
EXPERT_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PIPELINE_LIMIT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One candidate: a plan, or the reason why there is none or why it does not fit."""

    policy: PolicyConfig
    plan: Plan | None
    reason: str  # empty where it fits
    kind: str  # of the reason: divide | batch | memory | ""

    @property
    def name(self) -> str:
        return name_of(self.policy)


def name_of(policy: PolicyConfig) -> str:
    """Such as TP4 PP2 CP1 EP8 full."""
    options = options_of_policy(policy)
    experts = f" EP{options.expert_parallel}" if options.expert_parallel > 1 else ""
    chunks = f"x{options.virtual_stages}" if options.virtual_stages > 1 else ""
    return (
        f"TP{policy.tensor_parallel} PP{policy.pipeline_parallel}{chunks} CP{policy.context_parallel}{experts} "
        f"{options.recompute}"
    )


def all_layouts(config: Config, model: Model, machine: Machine, lengths: Lengths) -> list[Layout]:
    """Those that fit by planned step time, then the others in the order of the search."""
    found = [
        _layout(replace(config, policy=policy), model, machine, lengths)
        for policy in _policies(config, model)
    ]
    fitting = [layout for layout in found if not layout.reason]
    fitting.sort(key=lambda layout: layout.plan.time.total if layout.plan else 0.0)
    return fitting + [layout for layout in found if layout.reason]


def _policies(config: Config, model: Model) -> Iterator[PolicyConfig]:
    """The configuration's policy on other layouts; all else is kept. Virtual stages only where they are the config's own."""
    shape = model.shape
    stages = [p for p in range(1, PIPELINE_LIMIT + 1) if shape.layers % p == 0]
    experts = [e for e in EXPERT_SIZES if shape.experts and e <= shape.experts] or [1]
    for tensor, pipeline, context, expert, recompute in product(SIZES, stages, SIZES, experts, RECOMPUTE):
        changed = {"recompute": recompute, "expert_parallel": expert}
        options = config.policy.options | changed
        if pipeline != config.policy.pipeline_parallel:
            options.pop("virtual_stages", None)
        if tensor == 1:
            options.pop("tp_overlap", None)
        yield replace(
            config.policy,
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            context_parallel=context,
            sequence_parallel=tensor > 1,
            options=options,
        )


def _layout(config: Config, model: Model, machine: Machine, lengths: Lengths) -> Layout:
    policy = config.policy
    try:
        config.validate()
        check_layout(config, model.hf_config, world_size=machine.world_size)
    except ConfigError as error:
        return Layout(policy=policy, plan=None, reason=str(error), kind="divide")
    if reason := starving(config, world_size=machine.world_size):
        return Layout(policy=policy, plan=None, reason=reason, kind="batch")
    plan = make_plan(config, model, machine, lengths)
    kind = "memory" if plan.obstacles else ""
    return Layout(policy=policy, plan=plan, reason="; ".join(plan.obstacles), kind=kind)
