"""policy.options.overlap: reductions and gathers run beside the computation, and nobody sees the difference.

One update is compared with one rank's in test_layouts.py; here are several, with all that reads weights between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from policy_fixtures import (
    assert_same_weights,
    build,
    copied_weights,
    fp32,
    make_groups,
    nll_step,
    on_layout,
    pack_for,
    save_model,
)

from megatron_fec.config import PolicyConfig
from megatron_fec.policy import optimizer as policy_optimizer
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint, load_model_only
from megatron_fec.policy.checkpoint_save import save_checkpoint
from megatron_fec.policy.layout_settings import ddp_settings
from megatron_fec.policy.nonfinite import NonFiniteError
from megatron_fec.policy.reference import ReferencePolicy
from megatron_fec.policy.sampling import sample_responses
from megatron_fec.policy.step import Policy, compute_logprobs, cores, gather_weights

STATE = TrainerState(step=2, consumed_samples=14, weight_version=2, schedule={})
SHARDED: dict[str, Any] = {"distributed_optimizer": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sharded": SHARDED,
    "chunked_head": {**SHARDED, "logits_chunk_tokens": 8},
    "virtual": {**SHARDED, "pipeline_parallel": 2, "options": {"virtual_stages": 2}},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen3_deep")


@pytest.fixture(scope="module", autouse=True)
def small_buckets() -> Iterator[None]:
    """megatron-core's buckets of 40 million elements would hold each of these models in one; now the head has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            policy_optimizer, "ddp_settings", lambda policy: {**ddp_settings(policy), "bucket_size": 1000}
        )
        yield


def settings(layout: dict[str, Any], *, overlap: bool) -> PolicyConfig:
    return fp32(**{**layout, "options": {**layout.get("options", {}), "overlap": overlap}})


def steps(policy: Policy, count: int) -> list[tuple[float, float]]:
    (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=32)
    return [nll_step(policy, batches) for _ in range(count)]


@pytest.mark.parametrize("layout", ["chunked_head", "virtual"])
def test_a_run_has_the_same_bits(model_dir: Path, layout: str) -> None:
    """Steps, a log-prob pass, samples, a reference pass and weights, each right after an update."""

    def job(policy: Policy) -> tuple[list[list[tuple[float, float]]], list[Any]]:
        updates = pack_for(policy, make_groups(), micro_batch_tokens=32)
        reference = ReferencePolicy(policy)
        numbers = torch.full((2, 5), 0.4, dtype=torch.float64)
        runs = [steps(policy, 2)]
        found: list[Any] = [compute_logprobs(policy, updates)[1].means()]
        runs.append(steps(policy, 1))
        found.append(copied_weights(policy))
        runs.append(steps(policy, 1))
        # A data-parallel rank without prompts runs no forward, and must not be waited for.
        prompts = [[1, 2], [3]] if policy.layout.data_parallel_rank == 0 else []
        ids, logprobs = sample_responses(
            policy, prompts, uniforms=numbers[: len(prompts)], stop_id=36, temperature=1.0
        )
        dist.barrier()
        runs.append(steps(policy, 1))
        filled = reference.fill(policy, updates)
        found += [ids, logprobs, [mb.reference_logprobs for mb in filled[0]]]
        runs.append(steps(policy, 1))
        return runs, [*found, copied_weights(policy)]

    plain, overlapped = (
        on_layout(model_dir, job, settings(LAYOUTS[layout], overlap=overlap), data_parallel=2)
        for overlap in (False, True)
    )
    for wanted, got in zip(plain, overlapped, strict=True):
        assert [loss for run in got[0] for loss, _ in run] == [loss for run in wanted[0] for loss, _ in run]
        torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=0)
        # Other shards: the squares are added up in another order.
        norms, others = ([norm for run in runs for _, norm in run] for runs in (got[0], wanted[0]))
        assert norms == pytest.approx(others, rel=1e-6)


def test_it_does_overlap(model_dir: Path) -> None:
    """Reductions are under way when the backward ends, and a rank's weights are not whole when an update has ended."""

    def job(policy: Policy) -> tuple[int, list[bool], list[float]]:
        groups = [group for chunk in policy.chunks for group in chunk.bucket_groups]
        under_way: list[bool] = []
        look = policy.chunks[0].config.finalize_model_grads_func
        assert look is not None

        def first_look(*args: Any, **kwargs: Any) -> None:
            under_way[:] = [group.grad_reduce_handle is not None for group in groups]
            look(*args, **kwargs)

        policy.chunks[0].config.finalize_model_grads_func = first_look
        steps(policy, 2)  # in the first one megatron-core learns which gradients there are
        before = [p.detach().clone() for core in cores(policy) for p in core.parameters()]
        gather_weights(policy)
        after = [p for core in cores(policy) for p in core.parameters()]
        changes = [float((p - q).abs().max()) for p, q in zip(before, after, strict=True)]
        return len(groups), under_way, changes

    for number, under_way, changes in on_layout(
        model_dir, job, settings(LAYOUTS["sharded"], overlap=True), data_parallel=2
    ):
        assert number > 1 and under_way == [True] * number
        assert max(changes) > 1e-3
    for _, under_way, changes in on_layout(
        model_dir, job, settings(LAYOUTS["sharded"], overlap=False), data_parallel=2
    ):
        assert not any(under_way) and max(changes) == 0.0


def test_a_checkpoint_right_after_an_update_resumes_with_the_same_bits(
    model_dir: Path, tmp_path: Path
) -> None:
    """Also with several buckets, whose padding megatron-core's checkpoint forgets."""
    chosen = settings(LAYOUTS["virtual"], overlap=True)

    def job(policy: Policy) -> Any:
        steps(policy, 2)
        path = save_checkpoint(policy, tmp_path, STATE, keep=2)
        saved = copied_weights(policy)
        wanted = steps(policy, 2), copied_weights(policy)
        again = build(model_dir, chosen, layout=policy.layout)
        load_model_only(again, path)
        assert_same_weights(copied_weights(again), saved)
        steps(again, 1)
        load_checkpoint(again, path)
        return wanted, (steps(again, 2), copied_weights(again))

    for wanted, got in on_layout(model_dir, job, chosen, data_parallel=2):
        assert got[0] == wanted[0]
        assert_same_weights(got[1], wanted[1])


def test_a_gradient_that_is_not_finite_still_stops_every_rank(model_dir: Path) -> None:
    """The reduction has spread it by then, so another rank than the culprit may be named; no weight has moved."""

    def job(policy: Policy) -> tuple[str, list[tuple[float, float]]]:
        steps(policy, 1)
        before = copied_weights(policy)
        layer: Any = cores(policy)[0].decoder.layers[0]
        weight = layer.mlp.linear_fc2.weight
        if policy.layout.data_parallel_rank == 1:
            hook = weight.register_hook(lambda gradient: gradient * math.inf)
        (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=32)
        with pytest.raises(NonFiniteError) as error:
            nll_step(policy, batches)
        assert_same_weights(copied_weights(policy), before)
        if policy.layout.data_parallel_rank == 1:
            hook.remove()
        return str(error.value), steps(policy, 1)

    chosen = settings(LAYOUTS["sharded"], overlap=True)
    (first, one), (second, other) = on_layout(model_dir, job, chosen, data_parallel=2)
    assert first == second and "not finite: the gradient of module.decoder.layers.0.mlp.linear_fc2" in first
    assert one == other and all(math.isfinite(loss) for loss, _ in one)


def test_weights_in_fp8_are_finished_after_each_gather(model_dir: Path) -> None:
    """Transformer Engine makes the backward's copy of an FP8 weight then; here bf16 ones stand for them."""

    def job(policy: Policy) -> list[int]:
        finished: list[int] = []
        buffers: Any = param_and_grad_buffer
        buffers.is_float8tensor = lambda tensor: True
        buffers.post_all_gather_processing = lambda weights: finished.append(len(weights))
        (batches,) = pack_for(policy, make_groups())
        counts = []
        for read in (False, True):
            steps(policy, 1)
            finished.clear()
            if read:
                gather_weights(policy)
            compute_logprobs(policy, [batches])
            gather_weights(policy)
            counts.append(sum(finished))
        return counts

    weights = on_layout(model_dir, lambda policy: len(list(cores(policy)[0].parameters())))[0]
    settings = PolicyConfig(micro_batch_tokens=512, distributed_optimizer=True, options={"overlap": True})
    for counts in on_layout(model_dir, job, settings, data_parallel=2):
        assert counts == [weights, weights], (
            "once an update, whether or not they were read before the forward"
        )
