"""Router replay and the loss of balance: what the routers of a mixture of experts choose, keep and learn."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from policy_fixtures import (
    TokenKey,
    assert_same_weights,
    clip_token_loss,
    copied_weights,
    fp32,
    hf_gradients,
    make_groups,
    nll_step,
    on_layout,
    pack_for,
    recorded,
    save_model,
)
from torch import Tensor

from megatron_fec.config import OptimizerConfig
from megatron_fec.policy.reference import ReferencePolicy
from megatron_fec.policy.routing import RoutingTape, index_type
from megatron_fec.policy.step import Policy, compute_logprobs, cores, token_statistics, train_update
from megatron_fec.types import LossOutput, MicroBatch, TokenStats

TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
EXPERTS, CHOSEN, LAYERS = 4, 2, 2
REPLAY = {"router": "replay"}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"options": REPLAY | {"expert_parallel": 2, "recompute": "selective"}}),
    (1, TP2 | {"options": REPLAY | {"expert_parallel": 2}, "distributed_optimizer": True}),
    (2, PP2 | {"options": REPLAY | {"expert_parallel": 2, "recompute": "full"}, "micro_batch_tokens": 32}),
    (1, {"context_parallel": 2, "options": REPLAY | {"expert_tensor_parallel": 2, "recompute": "full"}}),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("routing"), "qwen3_moe")


def routers(policy: Policy) -> list[Any]:
    return [module for module in cores(policy)[0].modules() if isinstance(module, TopKRouter)]


@torch.no_grad()
def move_routers(policy: Policy) -> None:
    """Far away, to the same weights in every layout."""
    for router in routers(policy):
        generator = torch.Generator().manual_seed(int(router.layer_number or 0))
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))


def watch_routes(policy: Policy) -> list[tuple[int, bool, Tensor]]:
    """Filled by each forward of a router: its number, whether it builds a graph, the experts of each token [T, E]."""
    seen: list[tuple[int, bool, Tensor]] = []

    def see(number: int, router: TopKRouter, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        seen.append((number, torch.is_grad_enabled(), output[1].clone()))

    for number, router in enumerate(routers(policy)):
        router.register_forward_hook(partial(see, number))
    return seen


def as_map(experts: Tensor) -> Tensor:
    """[T, k] -> [T, experts] bool."""
    return torch.zeros(experts.shape[0], EXPERTS, dtype=torch.bool).scatter(1, experts.long(), True)


def two_updates(policy: Policy, tokens: int) -> list[list[MicroBatch]]:
    return pack_for(policy, make_groups(), micro_batch_tokens=tokens, prompts_per_update=2)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("data_parallel", "chosen"), [(1, {}), (2, PP2 | {"expert_parallel": 2}), (1, TP2)])
def test_each_update_routes_as_the_log_prob_pass_did(
    model_dir: Path, data_parallel: int, chosen: dict[str, Any], recompute: str
) -> None:
    expert_parallel = chosen.get("expert_parallel", 1)
    layout = {name: value for name, value in chosen.items() if name != "expert_parallel"}
    settings = fp32(**layout, options=REPLAY | {"recompute": recompute, "expert_parallel": expert_parallel})

    def job(policy: Policy) -> float:
        updates, _ = compute_logprobs(policy, two_updates(policy, 16))
        assert len(updates) == 2 and all(len(update) > 1 for update in updates)
        layers = LAYERS // policy.layout.pipeline_parallel
        for micro_batch in (mb for update in updates for mb in update):
            tokens = micro_batch.tokens.numel() // policy.layout.tensor_parallel
            assert micro_batch.routing is not None
            assert micro_batch.routing.shape == (layers, tokens, CHOSEN)
            assert micro_batch.routing.dtype == torch.uint8
        move_routers(policy)
        seen = watch_routes(policy)
        for update in reversed(updates):  # later epochs come in another order
            seen.clear()
            train_update(policy, update, clip_token_loss)
            for number in range(layers):
                wanted = [as_map(mb.routing[number]) for mb in update if mb.routing is not None]
                for is_graph in {True, recompute == "none"}:
                    got = [experts for n, graph, experts in seen if n == number and graph == is_graph]
                    assert len(got) == len(wanted) and all(map(torch.equal, got, wanted))
        for router in routers(policy):
            gradient: Tensor = router.weight.main_grad  # type: ignore[attr-defined]
            assert gradient.abs().max() > 0  # the gates of the chosen experts learn
        # Routed by the weights of now, most tokens go elsewhere.
        (live, _), _ = compute_logprobs(policy, updates)
        moved = [(old.routing != new.routing) for old, new in zip(updates[0], live, strict=True)]  # type: ignore[union-attr]
        return torch.cat([part.any(-1).flatten() for part in moved]).double().mean().item()

    for moved in on_layout(model_dir, job, settings, data_parallel=data_parallel):
        assert moved > 0.5


def trained_off_policy(policy: Policy, tokens: int) -> tuple[dict[TokenKey, Any], dict[str, Tensor]]:
    """Log-probs, then routers that have moved far, then one update: its tokens and the weights after it."""
    for group in policy.optimizer.param_groups:
        group["eps"] = 1.0
    (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=tokens)
    (filled,), _ = compute_logprobs(policy, [batches])
    move_routers(policy)
    seen: dict[TokenKey, Any] = {}
    train_update(policy, filled, recorded(clip_token_loss, seen))
    return seen, copied_weights(policy)


@cache
def off_policy(model_dir: Path, number: int | None, router: str = "replay") -> list[Any]:
    data_parallel, chosen = (1, {"options": {"router": router}}) if number is None else LAYOUTS[number]
    settings = fp32(**chosen)
    job = partial(trained_off_policy, tokens=settings.micro_batch_tokens)
    optimizer = OptimizerConfig(lr=0.5, clip_grad=1e9)
    return on_layout(model_dir, job, settings, data_parallel=data_parallel, optimizer=optimizer)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_replay_is_the_same_everywhere(model_dir: Path, number: int) -> None:
    ((wanted, weights),) = off_policy(model_dir, None)
    tokens: dict[TokenKey, Any] = {}
    for seen, got in off_policy(model_dir, number):
        tokens |= seen
        assert_same_weights(got, weights, atol=2e-6)
    assert tokens.keys() == wanted.keys()
    for key, values in wanted.items():
        assert tokens[key] == pytest.approx(values, rel=1e-6, abs=4e-6)
    ((live, _),) = off_policy(model_dir, None, "live")
    assert max(abs(live[key][0] - wanted[key][0]) for key in wanted) > 0.1


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_the_first_update_has_a_ratio_of_exactly_1(model_dir: Path, number: int) -> None:
    data_parallel, chosen = LAYOUTS[number]

    def job(policy: Policy) -> list[float]:
        distances: list[float] = []

        def loss(stats: TokenStats, micro_batch: MicroBatch) -> LossOutput:
            assert micro_batch.old_logprobs is not None
            distances.append((stats.logprobs - micro_batch.old_logprobs).abs().max().item())
            return clip_token_loss(stats, micro_batch)

        updates, _ = compute_logprobs(policy, two_updates(policy, 32))
        train_update(policy, updates[0], loss)
        return distances

    found = on_layout(model_dir, job, fp32(**chosen), data_parallel=data_parallel)
    assert {distance for rank in found for distance in rank} == {0.0}


def test_the_reference_routes_by_itself_and_live_routing_keeps_nothing(model_dir: Path) -> None:
    def job(policy: Policy) -> tuple[Tensor, Tensor]:
        reference = ReferencePolicy(policy)
        (batches,) = pack_for(policy, make_groups())
        wanted = token_statistics(policy, batches, second_moments=False)[0][1]
        move_routers(policy)
        updates, _ = compute_logprobs(policy, [batches])
        ((filled,),) = reference.fill(policy, updates)
        assert (filled.routing is None) == (not policy.tapes)
        assert wanted is not None and filled.reference_logprobs is not None
        return filled.reference_logprobs, wanted.logprobs

    for router in ("replay", "live"):
        ((got, wanted),) = on_layout(model_dir, job, fp32(options={"router": router}))
        assert torch.equal(got, wanted)


def test_supervised_updates_route_by_the_weights(model_dir: Path) -> None:
    """Warm starts have no log-prob pass; and a replay leaves nothing behind for them."""

    def job(policy: Policy) -> list[tuple[float, float]]:
        (batches,) = pack_for(policy, make_groups())
        (filled,), _ = compute_logprobs(policy, [batches])
        move_routers(policy)
        train_update(policy, filled, clip_token_loss)
        return [nll_step(policy, [replace(mb, routing=None) for mb in filled])]

    ((replayed,), (live,)) = (
        on_layout(model_dir, job, fp32(options={"router": router}), optimizer=OptimizerConfig(lr=0.0))[0]
        for router in ("replay", "live")
    )
    assert replayed == live


def test_two_micro_batches_under_way_are_told_apart() -> None:
    """1F1B with checkpoints: the recomputation of the first comes after the forward of the second."""
    tape = RoutingTape()
    first, second = (torch.tensor([[e, e + 1]], dtype=torch.uint8) for e in (0, 1))
    tape.start(chosen=[first, second], record=False)
    scores = torch.arange(4.0).reshape(1, 4)

    def chosen(*, is_graph: bool) -> list[int]:
        with torch.set_grad_enabled(is_graph):
            return tape.get_replay_topk(scores, 2)[1].flatten().tolist()

    order = [chosen(is_graph=graph) for graph in (False, False, True, True)]
    assert order == [[0, 1], [1, 2], [0, 1], [1, 2]]
    tape.start(chosen=[first, second], record=False)
    assert [chosen(is_graph=True) for _ in range(2)] == [[0, 1], [1, 2]]


def test_experts_are_numbered_by_the_smallest_integers() -> None:
    assert index_type(128) == index_type(256) == torch.uint8
    assert index_type(257) == torch.int16


@cache
def gate_gradient(
    model_dir: Path, coefficient: float, layout: tuple[tuple[str, Any], ...] = ()
) -> dict[str, Tensor]:
    """The gradients of the gates in one supervised update of one micro-batch."""

    def job(policy: Policy) -> dict[str, Tensor]:
        (batches,) = pack_for(policy, make_groups(), multiple=4)
        nll_step(policy, batches)
        return {name: g for name, g in hf_gradients(policy).items() if name.endswith("mlp.gate.weight")}

    settings = fp32(**dict(layout), options={"router_load_balance": coefficient})
    return on_layout(model_dir, job, settings, optimizer=OptimizerConfig(lr=0.0, clip_grad=1e9))[0]


def test_the_loss_of_balance_is_off_unless_asked_for(model_dir: Path) -> None:
    """Its gradient grows with the coefficient and comes on top of the loss."""
    none, one, two = (gate_gradient(model_dir, coefficient) for coefficient in (0.0, 1.0, 2.0))
    for name, gradient in none.items():
        added = one[name] - gradient
        assert added.abs().max() > 1e-3
        torch.testing.assert_close(two[name] - gradient, 2 * added, rtol=1e-4, atol=1e-6)

    def job(policy: Policy) -> tuple[str, float]:
        config: Any = cores(policy)[0].config
        return config.moe_router_load_balancing_type, config.moe_aux_loss_coeff

    assert on_layout(model_dir, job) == [("none", 0.0)]


@pytest.mark.parametrize("layout", [TP2, PP2], ids=["tp2", "pp2"])
def test_the_loss_of_balance_is_as_strong_in_another_layout(model_dir: Path, layout: dict[str, Any]) -> None:
    wanted, got = gate_gradient(model_dir, 1.0), gate_gradient(model_dir, 1.0, tuple(layout.items()))
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
