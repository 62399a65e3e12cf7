"""policy.options.offload: what each phase holds, that training does not notice, and what a phase may be followed by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from policy_fixtures import (
    assert_same_weights,
    copied_weights,
    fp32,
    make_groups,
    nll_step,
    on_layout,
    pack_for,
    save_model,
)

from megatron_fec.config import ConfigError, OptimizerConfig
from megatron_fec.policy import offload as module
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint
from megatron_fec.policy.checkpoint_save import Saver
from megatron_fec.policy.offload import MOVED, NEEDED, Kind, Offload, Phase, host_memory, storages_of
from megatron_fec.policy.reference import ReferencePolicy
from megatron_fec.policy.step import Policy, compute_logprobs
from megatron_fec.types import MicroBatch

KINDS: tuple[Kind, ...] = get_args(Kind)
ORDER: tuple[Phase, ...] = ("refit", "generate", "logprobs", "train")  # of a step
STATE = TrainerState(step=1, consumed_samples=4, weight_version=1, schedule={"name": "id"})
CASES = [  # tensor, pipeline, data parallel, precision, distributed optimizer, overlap
    (2, 1, 1, "bf16", True, False),
    (1, 2, 1, "fp32", False, False),
    (1, 1, 2, "bf16", True, False),
    (1, 1, 2, "bf16", True, True),
    (1, 1, 2, "bf16", False, False),
    (1, 1, 2, "fp32", True, False),
    (1, 1, 2, "fp32", False, False),
]
Case = tuple[int, int, int, str, bool, bool]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), "tied")


def held(policy: Policy) -> dict[Kind, int]:
    """Bytes on the device by kind."""
    return {kind: sum(s.nbytes() for s in storages_of(policy, kind)) for kind in KINDS}


def one_step(policy: Policy, offload: Offload, batch: list[MicroBatch]) -> list[Any]:
    """What a step of the trainer reads from the policy in each of its phases."""
    offload.enter("refit")
    read: list[Any] = [copied_weights(policy)]
    offload.enter("generate")
    offload.enter("logprobs")
    filled, sums = compute_logprobs(policy, [batch])
    read.append(sums.means())
    offload.enter("train")
    read += [nll_step(policy, filled[0]), nll_step(policy, filled[0])]
    policy.optimizer.zero_grad()
    return read


def run(model_dir: Path, how: str, case: Case) -> list[list[Any]]:
    def job(policy: Policy) -> list[Any]:
        offload = Offload(policy, how, policy_samples=False)
        offload.enter("generate")  # while an engine is built, before there are moments
        offload.enter("train")
        (batch,) = pack_for(policy, make_groups())
        read = [one_step(policy, offload, batch) for _ in range(3)]
        offload.enter("refit")
        return [*read, copied_weights(policy)]

    tensor, pipeline, data, precision, distributed, overlap = case
    settings = fp32(
        precision=precision,
        distributed_optimizer=distributed,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        options={"overlap": overlap},
    )
    return on_layout(model_dir, job, settings, data_parallel=data, optimizer=OptimizerConfig(lr=1e-3))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_the_same_to_the_bit(model_dir: Path, case: Case) -> None:
    expected = run(model_dir, "none", case)
    for how in ("optimizer", "all") if case[-2:] == (True, False) else ("all",):
        for reads, wants in zip(run(model_dir, how, case), expected, strict=True):
            assert_same_weights(reads[-1], wants[-1])
            for got, wanted in zip(reads[:-1], wants[:-1], strict=True):
                assert_same_weights(got[0], wanted[0])
                assert got[1:] == wanted[1:]
    assert not torch.equal(*(expected[0][step][0]["lm_head.weight"] for step in (0, 2)))


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_is_given_back(tied_dir: Path, precision: str, distributed: bool) -> None:
    """Every storage of a parameter, a gradient and the optimizer's state has size 0 where its kind is away."""

    def job(policy: Policy) -> dict[tuple[str, str], dict[Kind, int]]:
        (batch,) = pack_for(policy, make_groups())
        nll_step(policy, batch)  # the moments are there now
        policy.optimizer.zero_grad()
        seen = {("", "all"): held(policy)}
        for how in MOVED:
            offload = Offload(policy, how, policy_samples=False)
            for phase in (*ORDER, "generate", "save"):
                offload.enter(phase)
                seen[how, phase] = held(policy)
                if how == "all" and phase == "generate":
                    assert {p.untyped_storage().nbytes() for p in policy.chunks[0].parameters()} == {0}
                    gradients: list[Any] = [p.main_grad for p in policy.chunks[0].parameters()]  # type: ignore[attr-defined]
                    assert {gradient.untyped_storage().nbytes() for gradient in gradients} == {0}
            offload.enter("train")
        return seen

    settings = fp32(precision=precision, distributed_optimizer=distributed)
    (seen,) = on_layout(tied_dir, job, settings)
    whole = seen.pop(("", "all"))
    assert all(whole.values())
    moments = 2 if precision == "fp32" else 3  # with bf16, master weights of their own
    parameters = whole["weights"] // (4 if precision == "fp32" else 2)
    assert whole["optimizer"] == pytest.approx(4 * moments * parameters, rel=0.01)
    for (how, phase), sizes in seen.items():
        expected = {
            kind: 0 if kind in MOVED[how] and kind not in NEEDED[phase] else whole[kind]  # type: ignore[index]
            for kind in KINDS
        }
        assert sizes == expected, (how, phase)


def test_a_policy_that_samples_keeps_its_weights(model_dir: Path) -> None:
    def job(policy: Policy) -> dict[Kind, int]:
        offload = Offload(policy, "all", policy_samples=True)
        offload.enter("generate")
        return held(policy)

    (sizes,) = on_layout(model_dir, job)
    assert sizes["weights"] > 0 and sizes["gradients"] == 0


def test_host_memory_has_room_for_moments_and_is_used_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(policy: Policy) -> list[tuple[str, int]]:
        made = []

        def noted(num_bytes: int, kind: str) -> torch.Tensor:
            made.append((kind, num_bytes))
            return host_memory(num_bytes, kind)

        monkeypatch.setattr(module, "host_memory", noted)  # in this rank's process
        offload = Offload(policy, "all", policy_samples=False)
        (batch,) = pack_for(policy, make_groups())
        for _ in range(4):
            one_step(policy, offload, batch)
        return made

    (made,) = on_layout(model_dir, job, fp32(precision="bf16", distributed_optimizer=True))
    assert [kind for kind, _ in made] == ["optimizer", "weights"]
    assert made[0][1] > 5.9 * made[1][1]  # fp32 master weights and two moments, beside bf16 weights


def test_a_host_without_memory_is_a_clear_error() -> None:
    with pytest.raises(
        ConfigError, match=r"offload needs 4,611,686,018,427,387,904 bytes of pinned .* for the optimizer"
    ):
        host_memory(1 << 62, "optimizer")


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_a_save_after_a_validation_and_a_resume(model_dir: Path, tmp_path: Path, distributed: bool) -> None:
    """In the background, with everything away again at once; the resumed policy goes on as the one that did not stop."""
    settings = fp32(precision="bf16", distributed_optimizer=distributed)

    def first(policy: Policy) -> list[Any]:
        offload, saver = Offload(policy, "all", policy_samples=False), Saver()
        (batch,) = pack_for(policy, make_groups())
        one_step(policy, offload, batch)
        for phase in ("refit", "generate", "logprobs", "save"):  # a validation, or a stop after sampling
            offload.enter(phase)
        saver.save(policy, tmp_path, STATE, keep=1, in_background=True)
        offload.enter("generate")
        assert len(saver.finished(wait=True)) == 1
        return one_step(policy, offload, batch)

    def second(policy: Policy) -> list[Any]:
        offload = Offload(policy, "all", policy_samples=False)
        offload.enter("generate")
        offload.enter("train")
        load_checkpoint(policy, tmp_path / "step_000001")
        (batch,) = pack_for(policy, make_groups())
        return one_step(policy, offload, batch)

    wanted, got = (on_layout(model_dir, job, settings, data_parallel=2) for job in (first, second))
    for one, other in zip(wanted, got, strict=True):
        assert_same_weights(other[0], one[0])
        assert other[1:] == one[1:]


def test_the_reference_policy_between_two_moves(model_dir: Path) -> None:
    def job(policy: Policy) -> tuple[Any, Any]:
        offload, reference = Offload(policy, "all", policy_samples=False), ReferencePolicy(policy)
        (batch,) = pack_for(policy, make_groups())
        (plain,) = reference.fill(policy, [batch])
        offload.enter("generate")
        offload.enter("logprobs")
        (moved,) = reference.fill(policy, [batch])
        return plain[0].reference_logprobs, moved[0].reference_logprobs

    ((plain, moved),) = on_layout(model_dir, job)
    assert plain is not None and torch.equal(plain, moved)
