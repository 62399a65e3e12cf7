"""The experiments of arXiv 2602.09782 at CPU scale, as data: which runs, what is claimed about them, what is drawn.

A claim is a number per seed that is above 0 when it holds (study/quantities.py); verdicts.py judges it over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_fec.study.quantities import (
    CLIP_FRACTION,
    EARLY,
    ENTROPY,
    ENTROPY_CHANGE,
    EPS_LOWER,
    EPS_UPPER,
    LATE,
    MIDDLE,
    PASS_AT,
    PEAK,
    PREDICTED,
    REWARD,
    START,
    WHOLE,
    Points,
    Quantity,
    Window,
    clip_fraction_by_mode,
    largest,
    mean,
    pass_at,
    peak,
    shape_correlation,
    slope_correlation,
    smallest,
    switches,
    tracking_error,
)
from megatron_fec.study.variants import REGIONS

FIG12 = json.loads(Path(__file__).with_name("fig12.json").read_text())
EXACT, EMBEDDED, TABULAR = ("exact",), ("embedded",), ("tabular",)
BANDITS = ("tabular", "random")
REWARDED = ("tabular", "embedded")
TRAINED = ("tabular", "random", "embedded")
BEFORE_TURN, AFTER_TURN = Window(start=0.45, end=0.5), Window(start=0.5, end=0.55)


@dataclass(frozen=True, slots=True)
class Claim:
    """Holds in a bed when the quantity is above 0."""

    text: str
    quantity: Quantity
    beds: tuple[str, ...]
    unit: str = "nats"


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of a metric per bed; kind is a key of plots.DRAW."""

    title: str
    metric: str
    beds: tuple[str, ...]
    variants: tuple[str, ...]
    kind: str = "curves"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """`runs`: by bed, the variants that claims and panels may use."""

    title: str
    about: str
    runs: dict[str, tuple[str, ...]]
    claims: tuple[Claim, ...]
    panels: tuple[Panel, ...]


def entropy(variant: str, window: Window) -> Quantity:
    return mean(variant, ENTROPY, window)


def reward(variant: str, window: Window) -> Quantity:
    return mean(variant, REWARD, window)


def reference_curve(name: str, metric: str) -> Points:
    """A digitised curve of Fig. 12 over the share of its plan; metric: entropy | clip_fraction."""
    return [(step / FIG12["plan_steps"][name], value) for step, value in FIG12["curves"][name][metric]]


def _region_claims() -> list[Claim]:
    raises = {"E1": False, "E2": True, "E3": True, "E4": False}
    claims = []
    for family in ("peaked", "mixed"):
        for region in REGIONS:
            kept = mean(f"only_{region}", ENTROPY_CHANGE + family, WHOLE)
            none = mean("closed_upper" if region < "E3" else "closed_lower", ENTROPY_CHANGE + family, WHOLE)
            verb, margin = ("raises", kept - none) if raises[region] else ("lowers", none - kept)
            claims.append(Claim(f"{family} states: keeping only {region} {verb} entropy", margin, EXACT))
        grpo = mean("grpo", ENTROPY_CHANGE + family, WHOLE)
        wider = {e: mean(f"extend_{e}", ENTROPY_CHANGE + family, WHOLE) for e in ("E2", "E4")}
        claims += [
            Claim(f"{family} states: extending E2 to 0.3 raises entropy", wider["E2"] - grpo, EXACT),
            Claim(f"{family} states: extending E4 to 0.3 lowers entropy", grpo - wider["E4"], EXACT),
        ]
    for region in REGIONS:
        change = mean("grpo", PREDICTED + region, WHOLE)
        verb, margin = ("positive", change) if raises[region] else ("negative", 0 - change)
        claims.append(Claim(f"predicted change by {region} under GRPO is {verb}", margin, EMBEDDED))
    for region in REGIONS:
        start, end = entropy(f"only_{region}", START), entropy(f"only_{region}", LATE)
        verb, margin = ("rises", end - start) if raises[region] else ("falls", start - end)
        claims.append(Claim(f"entropy {verb} when of its side only {region} is kept", margin, EMBEDDED))
    for high, low in (("E2", "E1"), ("E3", "E4")):
        margin = entropy(f"only_{high}", LATE) - entropy(f"only_{low}", LATE)
        claims.append(Claim(f"only {high} ends above only {low}", margin, EMBEDDED))
    return claims


_ONLY = tuple(f"only_{region}" for region in REGIONS)
_EXTEND = tuple(f"extend_{region}" for region in REGIONS)
_CLOSED = ("closed_upper", "closed_lower")
_REGIONS = Experiment(
    title="Regions E1 to E4 (Fig. 2c)",
    about="Which tokens move entropy. E1, E2: A > 0, 1 < r < 1.3, with p > 0.7, p <= 0.3; E3, E4: A < 0, 0.7 < r < 1. "
    "Exact: the expected change of one step of 8 updates, against a step in which every token of that side that "
    "has moved loses its gradient. Embedded: the share of each region in the change that the exact inner product "
    "predicts for GRPO's steps, and runs in which of its side only the region keeps its gradient.",
    runs={"exact": ("grpo", *_CLOSED, *_ONLY, *_EXTEND), "embedded": ("grpo", *_ONLY)},
    claims=tuple(_region_claims()),
    panels=(
        Panel("entropy change, only the region kept", "only", EXACT, (*_CLOSED, *_ONLY), "regions"),
        Panel("entropy change, region extended to 0.3", "extend", EXACT, ("grpo", *_EXTEND), "regions"),
        Panel("entropy, only the region kept", ENTROPY, EMBEDDED, ("grpo", *_ONLY)),
    ),
)

_DYNAMIC_RUNS = ("grpo", "clip_higher", "matched", "dynamic_upper", "dynamic_lower")
_UPPER_LATE = entropy("dynamic_upper", LATE)
_DYNAMIC = Experiment(
    title="Dynamic upper and dynamic lower (Fig. 6)",
    about="One line alone, at full weight all the time. The paper: dynamic upper raises entropy and costs accuracy, "
    "dynamic lower lowers entropy. 0.5 - 0.25 p is above 0.2 for every p, so dynamic upper is also a looser "
    "Clip-Higher; `matched`, a constant upper distance of the same mean width, tells the two apart.",
    runs=dict.fromkeys(TRAINED, _DYNAMIC_RUNS),
    claims=(
        Claim("GRPO loses entropy", entropy("grpo", START) - entropy("grpo", LATE), TRAINED),
        Claim("dynamic upper ends above GRPO", _UPPER_LATE - entropy("grpo", LATE), TRAINED),
        Claim("dynamic upper ends above its start", _UPPER_LATE - entropy("dynamic_upper", START), TRAINED),
        Claim("dynamic upper ends above `matched`", _UPPER_LATE - entropy("matched", LATE), TRAINED),
        Claim("Clip-Higher ends above GRPO", entropy("clip_higher", LATE) - entropy("grpo", LATE), TRAINED),
        Claim(
            "dynamic lower ends below GRPO", entropy("grpo", LATE) - entropy("dynamic_lower", LATE), TRAINED
        ),
        Claim(
            "dynamic upper ends with less reward than GRPO",
            reward("grpo", LATE) - reward("dynamic_upper", LATE),
            REWARDED,
            "reward",
        ),
    ),
    panels=(Panel("entropy", ENTROPY, TRAINED, _DYNAMIC_RUNS),),
)


def _reward_claims() -> list[Claim]:
    claims = []
    for name, label in (("id", "ID"), ("did", "DID"), ("od_0.6", "OD (0.6)")):
        early = reward("grpo", EARLY) - reward(name, EARLY)
        late = reward(name, LATE) - largest([reward("grpo", LATE), reward("clip_higher", LATE)])
        claims += [
            Claim(f"{label}: less reward than GRPO early", early, REWARDED, "reward"),
            Claim(f"{label}: more reward than GRPO and Clip-Higher late", late, REWARDED, "reward"),
        ]
    return claims


_SCHEDULE_RUNS = ("grpo", "clip_higher", "id", "did", "od", "od_0.6")
_SCHEDULES = Experiment(
    title="ID, DID and OD against GRPO and Clip-Higher (Fig. 7)",
    about="The paper: entropy rises then falls (ID), falls, rises and falls (DID), or oscillates under a falling ceiling "
    "(OD); the reward is lower than the baselines' early and higher late.",
    runs=dict.fromkeys(TRAINED, _SCHEDULE_RUNS),
    claims=(
        Claim("ID rises", entropy("id", PEAK) - entropy("id", START), TRAINED),
        Claim("ID falls afterwards", entropy("id", PEAK) - entropy("id", LATE), TRAINED),
        Claim("ID is above GRPO at its peak", entropy("id", PEAK) - entropy("grpo", PEAK), TRAINED),
        Claim("DID falls first", entropy("did", START) - entropy("did", EARLY), TRAINED),
        Claim("DID rises afterwards", entropy("did", MIDDLE) - entropy("did", EARLY), TRAINED),
        Claim("DID falls in the end", entropy("did", MIDDLE) - entropy("did", LATE), TRAINED),
        Claim("DID ends above GRPO", entropy("did", LATE) - entropy("grpo", LATE), TRAINED),
        Claim("OD, H_min = 0.2 H_init (the paper's), switches", switches("od") - 0.5, TRAINED, "switches"),
        Claim("OD, H_min = 0.6 H_init, switches twice", switches("od_0.6") - 1.5, TRAINED, "switches"),
        *_reward_claims(),
    ),
    panels=(
        Panel("entropy", ENTROPY, TRAINED, _SCHEDULE_RUNS),
        Panel("reward", REWARD, REWARDED, _SCHEDULE_RUNS),
    ),
)


def _pass_claims() -> list[Claim]:
    labels = {"dynamic_upper": "dynamic upper", "id": "ID", "did": "DID", "od_0.6": "OD (0.6)"}
    claims = []
    for name, label in labels.items():
        many = pass_at(name, "last") - pass_at("grpo", "last")
        one = pass_at(name, "first") - pass_at("grpo", "first")
        claims += [
            Claim(f"{label}: pass@32 above GRPO's", many, REWARDED, "pass@32"),
            Claim(f"{label}: gains more at pass@32 than at pass@1", many - one, REWARDED, "pass@k"),
        ]
    return claims


_PASS_RUNS = ("grpo", "clip_higher", "dynamic_upper", "id", "did", "od_0.6")
_PASS_AT_K = Experiment(
    title="pass@k in the middle of training (Fig. 8)",
    about="At half of the plan. The paper: pass@1 is equal and pass@32 higher under entropy control.",
    runs=dict.fromkeys(REWARDED, _PASS_RUNS),
    claims=tuple(_pass_claims()),
    panels=(Panel("pass@k at half of the plan", PASS_AT, REWARDED, _PASS_RUNS, "pass_at_k"),),
)

_RATIO_RUNS = ("id_0.3", "id_0.4", "id", "id_0.6")


def _rising(values: Sequence[Quantity]) -> Quantity:
    """The smallest step from one to the next."""
    return smallest([after - before for before, after in pairwise(values)])


_PHASE_RATIO = Experiment(
    title="The phase ratio of ID (Fig. 9)",
    about="The turn at 0.3, 0.4, 0.5 or 0.6 of the plan. The paper: a larger ratio peaks higher, and 0.5 is most accurate.",
    runs=dict.fromkeys(BANDITS, _RATIO_RUNS),
    claims=(
        Claim("0.6 peaks higher than 0.3", peak("id_0.6", ENTROPY) - peak("id_0.3", ENTROPY), BANDITS),
        Claim(
            "each ratio peaks above the one before", _rising([peak(v, ENTROPY) for v in _RATIO_RUNS]), BANDITS
        ),
        Claim(
            "each ratio has more entropy in the middle than the one before",
            _rising([entropy(v, MIDDLE) for v in _RATIO_RUNS]),
            BANDITS,
        ),
        Claim(
            "0.5 ends with the best reward",
            reward("id", LATE) - largest([reward(v, LATE) for v in _RATIO_RUNS if v != "id"]),
            TABULAR,
            "reward",
        ),
    ),
    panels=(
        Panel("entropy", ENTROPY, BANDITS, _RATIO_RUNS),
        Panel("reward", REWARD, TABULAR, _RATIO_RUNS),
    ),
)


def _clip(variant: str, window: Window) -> Quantity:
    return mean(variant, CLIP_FRACTION, window)


def _threshold_claims() -> list[Claim]:
    ratios = {
        "ID: clip fraction starts below GRPO's (Fig. 12: 0.33 of it)": 1
        - _clip("id", START) / _clip("grpo", START),
        "ID: clip fraction ends above GRPO's (Fig. 12: 1.3 of it)": _clip("id", LATE) / _clip("grpo", LATE)
        - 1,
        "DID: clip fraction below GRPO's in the middle (Fig. 12: 0.46 of it)": 1
        - _clip("did", MIDDLE) / _clip("grpo", MIDDLE),
        "OD (0.6): clips less while it boosts (Fig. 12: 0.54 of it)": 1 - clip_fraction_by_mode("od_0.6"),
    }
    claims = [Claim(text, quantity, REWARDED, "ratio") for text, quantity in ratios.items()]
    for name in ("id", "did"):
        text = f"{name.upper()}: entropy rises where the mean eps_upper is large"
        claims.append(Claim(text, slope_correlation(name, EPS_UPPER), REWARDED, "correlation"))
    for name in ("grpo", "id", "did"):
        similarity = shape_correlation(name, ENTROPY, reference_curve(name, "entropy"))
        claims.append(
            Claim(f"{name.upper()}: entropy has the shape of Fig. 12", similarity, REWARDED, "correlation")
        )
    for name, reading in (("did_printed", "printed"), ("did", "text")):
        drop = 1 - _clip(name, AFTER_TURN) / _clip(name, BEFORE_TURN)
        text = f"DID, phase II as {reading}: clip fraction drops at the turn (Fig. 12: by 0.38)"
        claims.append(Claim(text, drop, TABULAR, "ratio"))
    return claims


_CLIP_RUNS = ("grpo", "clip_higher", "id", "did", "od_0.6")
_SHAPES = ("grpo", "id", "did")
_THRESHOLDS = Experiment(
    title="Thresholds and clip fractions over time (Fig. 10 and 12)",
    about="Mean clip distances and the share of tokens that they cut. Dashed: digitised from Fig. 12, over the share of its "
    "plan; in the panels that say scaled, each curve over its own range.",
    runs={"tabular": (*_CLIP_RUNS, "did_printed"), "embedded": _CLIP_RUNS},
    claims=tuple(_threshold_claims()),
    panels=(
        Panel("mean eps_upper", EPS_UPPER, EMBEDDED, _CLIP_RUNS),
        Panel("mean eps_lower", EPS_LOWER, EMBEDDED, _CLIP_RUNS),
        Panel("clip fraction", CLIP_FRACTION, EMBEDDED, _CLIP_RUNS),
        Panel("clip fraction", CLIP_FRACTION, TABULAR, ("grpo", "did", "did_printed")),
        Panel("entropy, scaled", ENTROPY, EMBEDDED, _SHAPES, "shapes"),
        Panel("clip fraction, scaled", CLIP_FRACTION, EMBEDDED, _SHAPES, "shapes"),
    ),
)

_STATIC_RUNS = ("grpo", "id", "static_id", "did", "static_did")
_STATIC = Experiment(
    title="Static thresholds in the same schedules (Fig. 13)",
    about="Both lines replaced by constants. The paper: no rise and fall, and entropy still collapses.",
    runs=dict.fromkeys(TRAINED, _STATIC_RUNS),
    claims=(
        Claim("static ID does not rise", entropy("static_id", START) - entropy("static_id", PEAK), TRAINED),
        Claim("ID is above static ID at its peak", entropy("id", PEAK) - entropy("static_id", PEAK), TRAINED),
        Claim("DID ends above static DID", entropy("did", LATE) - entropy("static_did", LATE), TRAINED),
        Claim(
            "static ID ends below its start",
            entropy("static_id", START) - entropy("static_id", LATE),
            TRAINED,
        ),
        Claim(
            "static DID ends below its start",
            entropy("static_did", START) - entropy("static_did", LATE),
            TRAINED,
        ),
    ),
    panels=(Panel("entropy", ENTROPY, TRAINED, _STATIC_RUNS),),
)

OPEN_LOOP = ("grpo", "clip_higher", "dynamic_upper", "dynamic_lower", "id", "did", "od", "od_0.6")
_ERROR = tracking_error("target", end=0.5)
_SHOWN = ("target", "grpo", "id", "did")
_CONTROLLER = Experiment(
    title="Closed loop: entropy follows a target (not in the paper)",
    about="algorithm.schedule.name=target: both thresholds move by a PI rule. The target H* falls by half a cosine from the "
    "run's first entropy to half of it, or stays. Error: mean of |H - H*| / H* over all steps.",
    runs={"tabular": (*OPEN_LOOP, "target", "target_hold"), "embedded": (*OPEN_LOOP, "target")},
    claims=(
        Claim("cosine to half: mean error at most 0.05", 0.05 - _ERROR, TABULAR, "relative error"),
        Claim("cosine to half: mean error at most 0.08", 0.08 - _ERROR, EMBEDDED, "relative error"),
        Claim(
            "cosine to half: smaller error than the seed's best open loop",
            smallest([tracking_error(v, end=0.5) for v in OPEN_LOOP]) - _ERROR,
            REWARDED,
            "relative error",
        ),
        Claim(
            "first entropy held: mean error at most 0.05",
            0.05 - tracking_error("target_hold", end=1.0),
            TABULAR,
            "relative error",
        ),
        Claim(
            "ends with GRPO's reward or more",
            reward("target", LATE) - reward("grpo", LATE),
            REWARDED,
            "reward",
        ),
    ),
    panels=(
        Panel("entropy and its target", ENTROPY, TABULAR, (*_SHOWN, "target_hold"), "target"),
        Panel("entropy and its target", ENTROPY, EMBEDDED, _SHOWN, "target"),
    ),
)

EXPERIMENTS: dict[str, Experiment] = {
    "regions": _REGIONS,
    "dynamic": _DYNAMIC,
    "schedules": _SCHEDULES,
    "pass_at_k": _PASS_AT_K,
    "phase_ratio": _PHASE_RATIO,
    "thresholds": _THRESHOLDS,
    "static": _STATIC,
    "controller": _CONTROLLER,
}
