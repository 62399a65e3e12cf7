"""What a report shows: its panels, in order. A panel whose metrics no run has is left out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fec.run_log import TOKENS_PER_SECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric of a panel, or all metrics that start with `key` where it ends with a slash."""

    key: str
    label: str = ""  # shown where the panel has several curves
    scale: float = 1.0
    band: str = ""  # prefix of the _p10 and _p90 metrics that shade it


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    caption: str
    curves: tuple[Curve, ...]
    is_log: bool = False


PANELS = (
    Panel(
        title="Entropy",
        caption="Nats per response token, of the policy that sampled the step.",
        curves=(Curve(key="train_rollouts/entropy"),),
    ),
    Panel(
        title="Reward",
        caption="Mean over all responses of the step.",
        curves=(Curve(key="train_rollouts/reward"),),
    ),
    Panel(
        title="Pass rate of groups",
        caption="Share of prompts with at least one right response.",
        curves=(Curve(key="train_rollouts/group_pass_rate"),),
    ),
    Panel(
        title="pass@k",
        caption="Validation, unbiased estimate.",
        curves=(Curve(key="val_rollouts/pass_at_k/"),),
    ),
    Panel(
        title="mean@k",
        caption="Validation, mean reward of k responses.",
        curves=(Curve(key="val_rollouts/mean_at_k/"),),
    ),
    Panel(
        title="Upper clip distance",
        caption="eps_upper: mean over response tokens; the band holds 80 % of them.",
        curves=(Curve(key="train_optim/eps_upper_mean", band="train_optim/eps_upper"),),
    ),
    Panel(
        title="Lower clip distance",
        caption="eps_lower: mean over response tokens; the band holds 80 % of them.",
        curves=(Curve(key="train_optim/eps_lower_mean", band="train_optim/eps_lower"),),
    ),
    Panel(
        title="Clip fractions",
        caption="Share of response tokens whose gradient is cut: good tokens above, bad tokens below the range.",
        curves=(
            Curve(key="train_optim/clip_fraction_upper", label="upper"),
            Curve(key="train_optim/clip_fraction_lower", label="lower"),
        ),
    ),
    Panel(
        title="Ratio moved",
        caption="Share of response tokens whose probability ratio is not 1: without it no threshold can act.",
        curves=(Curve(key="train_optim/ratio_moved"),),
    ),
    Panel(
        title="Gradient norm and twice the entropy",
        caption="The entropy bounds the policy gradient (arXiv 2509.03493); logarithmic axis.",
        curves=(
            Curve(key="train_optim/grad_norm", label="gradient norm"),
            Curve(key="train_rollouts/entropy", label="2 x entropy", scale=2.0),
        ),
        is_log=True,
    ),
    Panel(
        title="Entropy change of a step, predicted",
        caption="To first order, for a unit step in the logits, mean over response tokens (docs/strategies.md); "
        "without the strategy: as if no token were clipped or weighed.",
        curves=(
            Curve(key="train_optim/dH/predicted", label="predicted"),
            Curve(key="train_optim/dH/unclipped", label="without the strategy"),
        ),
    ),
    Panel(
        title="Entropy change, measured",
        caption="On the tokens that train: entropy now minus entropy before the step's first update, mean over the updates.",
        curves=(Curve(key="train_optim/dH/measured"),),
    ),
    Panel(
        title="Predicted entropy change by region",
        caption="E1: good and probable, E2: good and improbable, E3: bad and probable, E4: bad and improbable.",
        curves=tuple(
            Curve(key=f"train_optim/dH/region_{name}", label=name) for name in ("E1", "E2", "E3", "E4")
        ),
    ),
    Panel(
        title="Target entropy",
        caption="Schedule target: where the entropy should be, and where it was.",
        curves=(
            Curve(key="train_optim/target_entropy", label="target"),
            Curve(key="train_rollouts/entropy", label="measured"),
        ),
    ),
    Panel(
        title="Response length",
        caption="Mean number of tokens.",
        curves=(Curve(key="train_rollouts/response_length"),),
    ),
    Panel(
        title="Truncated responses",
        caption="Share that reached the length limit.",
        curves=(Curve(key="train_rollouts/truncated"),),
    ),
    Panel(
        title="Log-probability mismatch",
        caption="Mean |trainer - engine| at the same weights.",
        curves=(Curve(key="train_rollouts/mismatch"),),
    ),
    Panel(
        title="Peak GPU memory by part of a step",
        caption="GiB in tensors, the largest of all ranks; a save's stands one step later.",
        curves=(Curve(key="memory/allocated_gib/"),),
    ),
    Panel(
        title="Peak host memory by part of a step",
        caption="GiB resident, of the largest rank; a save's stands one step later.",
        curves=(Curve(key="memory/host_gib/"),),
    ),
    Panel(
        title="Throughput",
        caption="Response tokens per second of the whole step.",
        curves=(Curve(key=TOKENS_PER_SECOND),),
    ),
)
