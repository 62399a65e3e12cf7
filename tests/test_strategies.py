"""Names and options of strategies, from the configuration to the function that runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_fec.algorithm.advantages import ADVANTAGES
from megatron_fec.algorithm.losses import ADDITIONS, MARKS, POLICY_LOSSES
from megatron_fec.algorithm.schedules import SCHEDULES
from megatron_fec.algorithm.strategies import build_policy_loss, marks_of, needs_reference
from megatron_fec.config import ConfigError, load_config, save_config
from megatron_fec.types import ClipBounds, LossInputs

MINIMAL = """
model: {path: embedded}
algorithm: {prompts_per_update: 4, schedule: {name: id, total_steps: 6, options: {lower_schedule: text}}}
rollout: {prompts_per_step: 12, group_size: 2, max_prompt_tokens: 10, max_response_tokens: 22}
data: {train: embedded:countdown}
trainer: {run_dir: runs/x, max_steps: 5}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.policy_loss=ce_gpo"],
            r"algorithm\.policy_loss=ce_gpo must be one of .*Did you mean ce_gppo\?",
        ),
        (
            ["algorithm.policy_loss=clip+entropy_bonu"],
            r"policy_loss=entropy_bonu .*Did you mean entropy_bonus\?",
        ),
        (["algorithm.advantage=rlo"], r"algorithm\.advantage=rlo must be one of .*Did you mean rloo\?"),
        (["algorithm.advantage=grpo+overlon"], r"algorithm\.advantage=overlon .*Did you mean overlong\?"),
        (["algorithm.schedule.name=targt"], r"algorithm\.schedule\.name=targt .*Did you mean target\?"),
        (["algorithm.aggregation=token_men"], r"aggregation=token_men .*Did you mean token_mean\?"),
        (
            ["algorithm.options.dual_clp=3"],
            r"algorithm\.options\.dual_clp is not read by clip \+ grpo\. Did you mean dual_clip\?",
        ),
        (
            [
                "algorithm.policy_loss=reinforce",
                "algorithm.schedule.name=grpo",
                "algorithm.options.dual_clip=3",
            ],
            r"algorithm\.options\.dual_clip is not read by reinforce \+ grpo",
        ),
        (["algorithm.options.dual_clip=high"], r"dual_clip=high must be greater than 1, or null"),
        (
            ["algorithm.schedule.name=grpo", "algorithm.schedule.options.phase_ratio=0.3"],
            r"phase_ratio is not read by grpo",
        ),
        (["algorithm.schedule.options.h_init=1"], r"algorithm\.schedule\.options\.h_init is not read by id"),
        (
            ["algorithm.schedule.name=target"],
            r"algorithm\.schedule\.options\.target_shape is required by target",
        ),
        (
            ["algorithm.policy_loss=sapo"],
            r"schedule\.name=id with algorithm\.policy_loss=sapo does nothing: that loss has no clip range",
        ),
        (
            ["algorithm.policy_loss=gspo", "algorithm.schedule.name=dynamic_upper"],
            r"schedule\.name=dynamic_upper with algorithm\.policy_loss=gspo does nothing",
        ),
        (
            ["algorithm.schedule.name=grpo", "algorithm.thresholds.upper=[0,0.28]"],
            r"thresholds\.upper=\[0\.0, 0\.28\] does nothing with algorithm\.schedule\.name=grpo",
        ),
        (
            [
                "algorithm.policy_loss=cispo",
                "algorithm.schedule.name=grpo",
                "algorithm.thresholds.eps_std=0.3",
            ],
            r"thresholds\.eps_std=0\.3 does nothing with .*policy_loss=cispo",
        ),
        (["algorithm.policy_loss=clip+kl+kl"], r"clip\+kl\+kl adds kl to what has its effect already"),
        (
            ["algorithm.policy_loss=clip+truncated_importance+masked_importance"],
            r"adds truncated_importance .* one of masked_importance, truncated_importance",
        ),
        (["algorithm.advantage=grpo+overlong", "algorithm.options.overlong_buffer=22"], r"less than .*=22"),
        (
            [
                "algorithm.policy_loss=kl_cov",
                "algorithm.schedule.name=grpo",
                "algorithm.prompts_per_update=12",
            ],
            r"policy_loss=kl_cov with one update per rollout does nothing",
        ),
        (
            [
                "algorithm.policy_loss=clip_cov",
                "algorithm.options.stat_scope=micro",
                "policy.context_parallel=2",
                "policy.micro_batch_tokens=64",
            ],
            r"stat_scope=micro with policy\.context_parallel=2.*Use algorithm\.options\.stat_scope=batch",
        ),
    ],
)
def test_a_wrong_strategy_is_named_with_its_remedy(minimal: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, overrides)


def test_every_strategy_loads_with_its_defaults(minimal: Path):
    static = ["algorithm.schedule.name=grpo"]
    for loss in POLICY_LOSSES:
        needed = ["algorithm.options.region=E1"] if loss == "region" else []
        load_config(minimal, [*static, f"algorithm.policy_loss={loss}", *needed])
    for addition in ADDITIONS:
        load_config(minimal, [*static, f"algorithm.policy_loss=clip+{addition}"])
    for advantage in ADVANTAGES:
        load_config(minimal, [*static, f"algorithm.advantage={advantage}"])
    target = ["algorithm.schedule.options.target_shape=cosine", "algorithm.schedule.options.target_end=0.5"]
    for schedule in SCHEDULES:
        load_config(
            minimal, [f"algorithm.schedule.name={schedule}", *(target if schedule == "target" else [])]
        )


def test_another_choice_drops_what_a_lower_layer_set_for_the_first(minimal: Path, tmp_path: Path):
    assert load_config(minimal, ["algorithm.schedule.name=grpo"]).algorithm.schedule.options == {}
    kept = load_config(minimal, ["algorithm.schedule.name=did"]).algorithm.schedule.options
    assert kept == {"lower_schedule": "text"}
    upper = tmp_path / "upper.yaml"
    upper.write_text(
        "base: minimal.yaml\nalgorithm: {options: {dual_clip: 3.0}, schedule: {name: od, options: {h_min: 0.1}}}\n"
    )
    assert load_config(upper).algorithm.options == {"dual_clip": 3.0}
    changed = load_config(upper, ["algorithm.policy_loss=sapo", "algorithm.schedule.name=grpo"]).algorithm
    assert changed.options == {} and changed.schedule.options == {}
    kept = load_config(upper, ["algorithm.policy_loss=ce_gppo"]).algorithm
    assert kept.schedule.options == {"h_min": 0.1}
    assert kept.options == {}  # ce_gppo has a dual_clip too, with a default of its own
    assert load_config(upper, ["algorithm.policy_loss=clip+kl"]).algorithm.options == {"dual_clip": 3.0}
    upper.write_text(
        "base: minimal.yaml\nalgorithm: {thresholds: {upper: [-0.5, 0.8], lower: [-0.2, 0.4]}}\n"
    )
    assert load_config(upper).algorithm.thresholds.upper == [-0.5, 0.8]
    assert load_config(upper, ["algorithm.schedule.name=grpo"]).algorithm.thresholds.upper == [-0.25, 0.5]
    lower = load_config(upper, ["algorithm.schedule.name=dynamic_lower"]).algorithm.thresholds
    assert (lower.upper, lower.lower) == ([-0.25, 0.5], [-0.2, 0.4])
    upper.write_text("base: minimal.yaml\nalgorithm: {options: {dual_cilp: 3.0}}\n")
    with pytest.raises(
        ConfigError, match="dual_cilp is not read"
    ):  # a typo is not what another choice left behind
        load_config(upper, ["algorithm.schedule.name=od"])
    upper.write_text("base: minimal.yaml\nalgorithm: {options: {dual_clip: 3.0}, schedule: {name: od}}\n")
    saved = tmp_path / "saved.yaml"
    config = load_config(
        upper, ["algorithm.policy_loss=clip+entropy_bonus", "algorithm.options.entropy_coef=0.01"]
    )
    save_config(config, saved)
    assert load_config(saved) == config


def inputs_of(num_tokens: int = 12) -> LossInputs:
    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(num_tokens, generator=generator).double() - 0.1
    logprobs = (old + 0.4 * torch.randn(num_tokens, generator=generator).double()).requires_grad_()
    eps = torch.full((num_tokens,), 0.2, dtype=torch.float64)
    mask = torch.arange(num_tokens) % 4 != 0
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=torch.randn(num_tokens, generator=generator).double(),
        response_mask=mask,
        bounds=ClipBounds(eps_lower=eps, eps_upper=eps),
        entropy=torch.rand(num_tokens, generator=generator).double().requires_grad_(),
        rollout_logprobs=old - 0.3,
        sequence_ids=torch.arange(num_tokens) // 6,
        response_lengths=torch.full((num_tokens,), 4),
        response_starts=torch.arange(num_tokens) % 6 == 1,
        update_lengths=torch.tensor([4, 4]),
    )


def test_an_addition_adds_its_loss_and_a_weight_multiplies_the_first():
    inputs = inputs_of()
    assert inputs.entropy is not None
    mask = inputs.response_mask
    plain = build_policy_loss("clip", {})(inputs)
    options = {"entropy_coef": 0.7, "importance_cap": 1.2}
    both = build_policy_loss("clip+entropy_bonus+truncated_importance", options)(inputs)
    # rollout_logprobs = old - 0.3, so the weight is min(exp(0.3), 1.2) = 1.2 on every token.
    expected = 1.2 * plain.loss_sum - 0.7 * inputs.entropy[mask].sum()
    assert torch.allclose(both.loss_sum, expected, rtol=1e-12)
    assert int(both.count) == int(plain.count) == int(mask.sum())
    assert set(plain.metrics.names) < set(both.metrics.names)
    (entropy_gradient,) = torch.autograd.grad(both.loss_sum, inputs.entropy)
    assert entropy_gradient.tolist() == [-0.7 * kept for kept in mask.tolist()]  # not weighed


def test_options_reach_the_function_that_reads_them():
    inputs = replace(inputs_of(), advantages=-torch.ones(12, dtype=torch.float64))
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach() - 1.5)  # ratio 4.5
    plain = build_policy_loss("clip", {})(inputs)
    clipped = build_policy_loss("clip", {"dual_clip": 2.0, "unrelated": 1})(inputs)
    count = int(inputs.response_mask.sum())
    assert plain.loss_sum.item() == pytest.approx(count * 4.4816890703)
    assert clipped.loss_sum.item() == pytest.approx(count * 2.0)


def test_marks_are_wanted_by_batch_scope_only():
    assert marks_of("clip", {}) is None
    for name in MARKS:
        assert marks_of(name, {"stat_scope": "batch"}) is not None
        assert marks_of(f"{name}+entropy_bonus", {"stat_scope": "micro"}) is None


def test_which_losses_need_a_reference_policy(minimal: Path):
    def needed(*overrides: str) -> bool:
        return needs_reference(load_config(minimal, ["algorithm.schedule.name=grpo", *overrides]).algorithm)

    assert not needed()
    assert needed("algorithm.policy_loss=clip+kl")
    assert not needed("algorithm.policy_loss=archer", "algorithm.options.archer_kl_coef=0")
    assert needed("algorithm.policy_loss=archer", "algorithm.options.archer_kl_coef=0.01")
