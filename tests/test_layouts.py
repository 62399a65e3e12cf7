"""The same batch and one update in every layout: one loss, one gradient, one clip set, one set of new weights.

TP 1, 2, 4 x PP 1, 2 x CP 1, 2, 4 x DP 1, 2, 4, sequence parallelism, both optimizers, recomputing, virtual stages, overlap,
the size of a micro-batch, the order in the packing, the three aggregations. Compared with one rank and one micro-batch.

Token sets, masks and counts are integers and equal. All else is fp32 sums of the same terms in another order: matrix
products over tensor shards, attention over rows padded to another length, gradients over micro-batches and ranks. Each
rounds to 6e-8 of the sum, which two layers and a head raise to some 1e-6. The largest differences of all cases, on CPU in
fp32, stand beside the tolerances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from policy_fixtures import (
    Outcome,
    TokenKey,
    assert_same_weights,
    clip_token_loss,
    copied_weights,
    fp32,
    make_groups,
    nll_step,
    old_logprob_table,
    on_layout,
    one_update,
    pack_for,
    save_model,
)

from megatron_fec.config import OptimizerConfig
from megatron_fec.policy import model as policy_model
from megatron_fec.policy.step import Policy, cores

LEARNING_RATE = 0.5
# Log-prob and entropy of each response token, values up to 12; found 2.9e-6.
TOKENS: Any = {"rel": 1e-6, "abs": 4e-6}
ON_POLICY: Any = {"rel": 1e-6}  # their means; found 4e-8
METRICS: Any = {"rel": 2e-6, "abs": 1e-6}  # the loss and its metrics, values up to 5; found 2.4e-7
GRADIENT_NORM: Any = {"rel": 2e-6}  # found 3.4e-7
# Of gradients below 1 at this learning rate: some 1e-6 of the largest, and the last bit of 1.5; found 5.8e-7.
NEW_WEIGHTS = 2e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A PolicyConfig's values, and how the batch is split."""

    settings: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()  # of policy.options
    data_parallel: int = 1
    micro_batch_tokens: int = 512  # the whole batch
    seed: int = 1  # of the order of the sequences
    aggregation: str = "token_mean"

    @property
    def name(self) -> str:
        parts = [f"{key}={value}" for key, value in (*self.settings, *self.options)]
        batch = [f"dp={self.data_parallel}", f"tokens={self.micro_batch_tokens}", f"seed={self.seed}"]
        return ",".join([*parts, *batch, self.aggregation])


def layout(
    data_parallel: int = 1,
    micro_batch_tokens: int = 512,
    seed: int = 1,
    aggregation: str = "token_mean",
    options: Any = None,
    **settings: Any,
) -> Layout:
    return Layout(
        settings=tuple(settings.items()),
        options=tuple((options or {}).items()),
        data_parallel=data_parallel,
        micro_batch_tokens=micro_batch_tokens,
        seed=seed,
        aggregation=aggregation,
    )


ONE = layout()
TP2: dict[str, Any] = {"tensor_parallel": 2}
PP2: dict[str, Any] = {"pipeline_parallel": 2}
CP2: dict[str, Any] = {"context_parallel": 2}
SP: dict[str, Any] = {"sequence_parallel": True}
DISTRIBUTED: dict[str, Any] = {"distributed_optimizer": True}
VIRTUAL: dict[str, Any] = {"virtual_stages": 2}
OVERLAP: dict[str, Any] = {"overlap": True}
LAYOUTS = [
    layout(micro_batch_tokens=16),
    layout(micro_batch_tokens=16, seed=2),
    layout(**TP2),
    layout(**TP2, **SP),
    layout(**PP2),
    layout(**PP2, micro_batch_tokens=16),
    layout(2),
    layout(2, micro_batch_tokens=16, **DISTRIBUTED),
    layout(**TP2, **PP2),
    layout(**TP2, **PP2, **SP, **DISTRIBUTED, micro_batch_tokens=32, options={"recompute": "full"}),
    layout(2, **TP2, **SP, **DISTRIBUTED, options={"recompute": "selective"}),
    layout(2, **PP2, micro_batch_tokens=32),
    layout(4, **DISTRIBUTED),
    layout(**CP2),
    layout(**CP2, **DISTRIBUTED, micro_batch_tokens=32, options={"recompute": "selective"}),
    layout(**CP2, **TP2, micro_batch_tokens=32, seed=2),
    layout(**CP2, **TP2, **SP, **DISTRIBUTED, micro_batch_tokens=32),
    layout(**CP2, **PP2, micro_batch_tokens=32, options={"recompute": "full"}),
    layout(2, **CP2, micro_batch_tokens=32),
    layout(2, **CP2, **DISTRIBUTED),
    layout(**TP2, logits_chunk_tokens=9),
    layout(**CP2, micro_batch_tokens=32, logits_chunk_tokens=7),
    layout(**TP2, **PP2, **SP, **DISTRIBUTED, micro_batch_tokens=32, logits_chunk_tokens=8),
]
CASES = [(kind, chosen) for kind in ("qwen3", "tied", "qwen2") for chosen in LAYOUTS] + [
    ("qwen3_kv4", layout(tensor_parallel=4)),
    ("qwen3_kv4", layout(tensor_parallel=4, **SP, **DISTRIBUTED, micro_batch_tokens=16)),
    ("qwen3_kv4", layout(context_parallel=4, micro_batch_tokens=32)),
    ("tied", layout(**TP2, **PP2, micro_batch_tokens=32, logits_chunk_tokens=8)),
    ("tied", layout(**CP2, **TP2, **SP, **PP2, **DISTRIBUTED, micro_batch_tokens=32)),
    ("qwen3_deep", layout(**PP2, micro_batch_tokens=32, options=VIRTUAL)),
    (
        "qwen3_deep",
        layout(**PP2, micro_batch_tokens=16, seed=2, options={**VIRTUAL, "recompute": "selective"}),
    ),
    ("qwen3_deep", layout(2, **PP2, **DISTRIBUTED, micro_batch_tokens=32, options=VIRTUAL | OVERLAP)),
    ("qwen3_deep", layout(**CP2, **PP2, micro_batch_tokens=32, options={**VIRTUAL, "recompute": "full"})),
    ("llama_tied_deep", layout(**PP2, micro_batch_tokens=32, options=VIRTUAL, logits_chunk_tokens=8)),
    (
        "llama_tied_deep",
        layout(**TP2, **PP2, **SP, **DISTRIBUTED, micro_batch_tokens=32, options={**VIRTUAL, **OVERLAP}),
    ),
    ("qwen3", layout(2, micro_batch_tokens=16, options=OVERLAP)),
    ("qwen3", layout(2, **DISTRIBUTED, micro_batch_tokens=16, options=OVERLAP)),
    ("tied", layout(2, **DISTRIBUTED, **PP2, micro_batch_tokens=32, options=OVERLAP, logits_chunk_tokens=8)),
    ("tied", layout(**CP2, **TP2, **SP, **DISTRIBUTED, micro_batch_tokens=32, options=OVERLAP)),
    ("qwen2", layout(**DISTRIBUTED, options=OVERLAP)),
    (
        "qwen3_moe_deep",
        layout(
            2,
            **PP2,
            **DISTRIBUTED,
            micro_batch_tokens=32,
            options={**VIRTUAL, **OVERLAP, "expert_parallel": 2},
        ),
    ),
    (
        "qwen3_moe_deep",
        layout(**PP2, micro_batch_tokens=32, options={**VIRTUAL, "router": "replay", "recompute": "full"}),
    ),
    *(
        ("qwen3", layout(aggregation=how, **chosen))
        for how in ("seq_mean_token_mean", "seq_mean_token_sum")
        for chosen in ({**CP2}, {**CP2, **PP2, "micro_batch_tokens": 32}, {"data_parallel": 2, "seed": 2})
    ),
]


@cache
def model_dir(root: Path, kind: str) -> Path:
    return save_model(root / kind, kind)


@pytest.fixture(scope="module", autouse=True)
def narrow_shards() -> Iterator[None]:
    """With shards as wide as the real ones the first would hold this small vocabulary alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_model, "VOCAB_MULTIPLE", 8)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@cache
def outcome(root: Path, kind: str, chosen: Layout, *, is_sgd: bool = True) -> Outcome:
    """What one update did, after checking that all ranks agree on it; tokens are those of the whole batch."""
    folder = model_dir(root, kind)
    table = old_logprob_table(folder)

    def job(policy: Policy) -> Outcome:
        if is_sgd:  # Adam's first step is the gradient's sign, which turns rounding into a whole step
            for group in policy.optimizer.param_groups:
                group["eps"] = 1.0
        (batches,) = pack_for(
            policy, make_groups(), micro_batch_tokens=chosen.micro_batch_tokens, seed=chosen.seed
        )
        assert (len(batches) > 1) == (chosen.micro_batch_tokens < 64)
        loss = partial(clip_token_loss, aggregation=chosen.aggregation)
        return one_update(policy, batches, old_logprobs=table, token_loss=loss)

    ranks = on_layout(
        folder,
        job,
        fp32(**dict(chosen.settings), options=dict(chosen.options)),
        data_parallel=chosen.data_parallel,
        optimizer=OptimizerConfig(lr=LEARNING_RATE, clip_grad=1e9),
    )
    tokens: dict[TokenKey, tuple[float, float, bool]] = {}
    for rank in ranks:
        assert rank.metrics == ranks[0].metrics and rank.on_policy == ranks[0].on_policy
        assert rank.grad_norm == ranks[0].grad_norm
        assert_same_weights(rank.weights, ranks[0].weights)
        shared = tokens.keys() & rank.tokens.keys()  # by tensor ranks, to the last bit
        assert {key: tokens[key] for key in shared} == {key: rank.tokens[key] for key in shared}
        tokens |= rank.tokens
    return replace(ranks[0], tokens=tokens)


@pytest.mark.parametrize(("kind", "chosen"), CASES, ids=lambda part: getattr(part, "name", part))
def test_one_update_is_the_same_everywhere(root: Path, kind: str, chosen: Layout) -> None:
    wanted = outcome(root, kind, replace(ONE, aggregation=chosen.aggregation))
    got = outcome(root, kind, chosen)
    assert got.tokens.keys() == wanted.tokens.keys() and len(wanted.tokens) == 67
    for key, (logprob, entropy, is_clipped) in wanted.tokens.items():
        assert got.tokens[key][:2] == pytest.approx((logprob, entropy), **TOKENS)
        assert got.tokens[key][2] == is_clipped
    assert got.on_policy == pytest.approx(wanted.on_policy, **ON_POLICY)
    assert got.metrics == pytest.approx(wanted.metrics, **METRICS)
    assert got.grad_norm == pytest.approx(wanted.grad_norm, **GRADIENT_NORM)
    assert_same_weights(got.weights, wanted.weights, atol=NEW_WEIGHTS)


def test_the_update_of_the_comparison_does_something(root: Path) -> None:
    wanted = outcome(root, "qwen3", ONE)
    before = on_layout(model_dir(root, "qwen3"), copied_weights)[0]
    for name, tensor in wanted.weights.items():
        change = (tensor - before[name]).abs().max().item()
        assert change > 500 * NEW_WEIGHTS, name
    for name in ("clip_fraction_upper", "clip_fraction_lower", "dual_clip_fraction"):
        assert 0 < wanted.metrics[name] < 0.5


@pytest.mark.parametrize(
    ("chosen", "same"),
    [
        (layout(options={"recompute": "full"}), ONE),
        (layout(options={"recompute": "selective"}), ONE),
        (layout(**DISTRIBUTED), ONE),
        (layout(2, **DISTRIBUTED), layout(2)),
        (layout(**PP2, micro_batch_tokens=16), layout(micro_batch_tokens=16)),
    ],
    ids=lambda chosen: chosen.name,
)
def test_the_same_operations_give_the_same_bits(root: Path, chosen: Layout, same: Layout) -> None:
    got, wanted = (outcome(root, "qwen2", which, is_sgd=False) for which in (chosen, same))
    assert got.tokens == wanted.tokens
    assert got.metrics == wanted.metrics
    assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)  # squares added up in another order
    assert_same_weights(got.weights, wanted.weights)


@pytest.mark.parametrize(
    ("recompute", "attention", "layers"), [("none", 1, 1), ("selective", 2, 1), ("full", 2, 2)]
)
@pytest.mark.parametrize(
    "chosen", [layout(), layout(**PP2, options=VIRTUAL), layout(**CP2, **TP2, **SP)], ids=lambda x: x.name
)
def test_recomputing_runs_the_forward_again(
    root: Path, chosen: Layout, recompute: str, attention: int, layers: int
) -> None:
    """Forwards of each attention core and of each layer in one update, for each micro-batch."""

    def job(policy: Policy) -> tuple[int, dict[tuple[int, str], int]]:
        counts: dict[tuple[int, str], int] = {}
        (batches,) = pack_for(policy, make_groups())
        for number, core in enumerate(cores(policy)):
            for name, module in core.named_modules():
                if name.endswith("core_attention") or name.removeprefix("decoder.layers.").isdigit():
                    counts[number, name] = 0
                    module.register_forward_pre_hook(partial(count, counts, (number, name)))
        nll_step(policy, batches)
        return len(batches), counts

    settings = fp32(**dict(chosen.settings), options={**dict(chosen.options), "recompute": recompute})
    kind = "qwen3_deep" if chosen.options else "qwen3"
    for num_batches, counts in on_layout(model_dir(root, kind), job, settings):
        assert sorted(counts.values()) == sorted([attention * num_batches, layers * num_batches] * 2)


def count(counts: dict[tuple[int, str], int], key: tuple[int, str], *unused: Any) -> None:
    counts[key] += 1
