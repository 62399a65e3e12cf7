"""Saving in the background: the weights of the step that was saved, while training changes them, and what may go wrong."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
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
from ranks import RankError, run_on_ranks

from megatron_fec.config import PolicyConfig
from megatron_fec.policy import checkpoint_tensors
from megatron_fec.policy.checkpoint import TrainerState, load_checkpoint
from megatron_fec.policy.checkpoint_files import (
    CheckpointError,
    find_checkpoints,
    newest_whole,
    read_manifest,
)
from megatron_fec.policy.checkpoint_save import PROBE_BYTES, Saver, save_checkpoint
from megatron_fec.policy.step import Policy

FILES = 2  # of a rank


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen3")


def state(step: int) -> TrainerState:
    return TrainerState(step=step, consumed_samples=0, weight_version=step, schedule={})


def steps(policy: Policy, count: int) -> list[tuple[float, float]]:
    (batches,) = pack_for(policy, make_groups(), micro_batch_tokens=64)
    return [nll_step(policy, batches) for _ in range(count)]


def held_back() -> Callable[[], None]:
    """From now on a writing process waits before each file, until the function that this returns is called."""
    gate, key = os.pipe()
    write_file = checkpoint_tensors._write_file

    def when_open(*arguments):
        os.read(gate, 1)
        return write_file(*arguments)

    checkpoint_tensors._write_file = when_open  # of this rank, which is a process of its own

    def let_go() -> None:
        os.write(key, bytes(FILES))

    return let_go


def writers() -> list[psutil.Process]:
    """The processes that write for this rank."""
    return psutil.Process().children()


@pytest.mark.parametrize(
    ("settings", "data_parallel"),
    [
        (fp32(tensor_parallel=2), 1),
        (fp32(precision="bf16", distributed_optimizer=True), 2),
        (fp32(pipeline_parallel=2, distributed_optimizer=True), 1),
    ],
    ids=["tp2", "dp2-bf16-distributed", "pp2-distributed"],
)
def test_the_weights_are_those_of_the_step(
    model_dir: Path, tmp_path: Path, settings: PolicyConfig, data_parallel: int
) -> None:
    """The writer starts after two more steps and a draw of random numbers, and writes what was there before them."""
    now, later = tmp_path / "now", tmp_path / "later"

    def job(policy: Policy) -> None:
        steps(policy, 2)
        save_checkpoint(policy, now, state(2), keep=1)
        before = copied_weights(policy)
        let_go = held_back()
        saver = Saver()
        saver.save(policy, later, state(2), keep=1, in_background=True)
        expected, weights = steps(policy, 2), copied_weights(policy)
        with pytest.raises(AssertionError):
            assert_same_weights(weights, before)
        assert saver.finished(wait=False) == []
        dist.barrier()
        assert find_checkpoints(later) == []
        let_go()
        assert saver.finished(wait=True) == [later / "step_000002"]
        assert saver.finished(wait=True) == [] and not writers()
        again = build(model_dir, settings, layout=policy.layout)
        load_checkpoint(again, later / "step_000002")
        assert_same_weights(copied_weights(again), before)
        assert steps(again, 2) == expected
        assert_same_weights(copied_weights(again), weights)

    on_layout(model_dir, job, settings, data_parallel=data_parallel)
    written, wanted = (read_manifest(folder / "step_000002") for folder in (later, now))
    tensors = [name for name in wanted if name.endswith((".distcp", ".pt"))]
    assert any(name.endswith(".distcp") for name in tensors)
    assert {name: written[name] for name in tensors} == {name: wanted[name] for name in tensors}
    assert written.keys() == wanted.keys()


def test_the_next_save_waits_for_the_one_before(model_dir: Path, tmp_path: Path) -> None:
    def job(policy: Policy) -> None:
        saver = Saver()
        for step in (1, 2):
            steps(policy, 1)
            saver.save(policy, tmp_path, state(step), keep=1, in_background=True)
        assert (tmp_path / "step_000001").is_dir()
        assert saver.finished(wait=True) == [tmp_path / "step_000001", tmp_path / "step_000002"]

    on_layout(model_dir, job)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_a_signal_that_stops_the_rank_does_not_stop_its_writer(model_dir: Path, tmp_path: Path) -> None:
    def job(policy: Policy) -> None:
        saver, let_go = Saver(), held_back()
        saver.save(policy, tmp_path, state(1), keep=1, in_background=True)
        (writer,) = writers()
        wait_until_ignored(writer, signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            writer.send_signal(number)
        let_go()
        assert saver.finished(wait=True) == [tmp_path / "step_000001"]

    on_layout(model_dir, job)


def wait_until_ignored(process: psutil.Process, number: signal.Signals) -> None:
    """Returns when the process has set itself up, which takes it a moment after the fork."""
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().split("SigIgn:")[1].split()[0], 16) >> (number - 1) & 1:
        assert process.is_running()


# ------------------------------------------------------------------ faults


def error_of(saver: Saver) -> str:
    """What the save in the background ends with, as training goes on and asks now and then."""
    try:
        while not saver.finished(wait=False):
            pass
    except CheckpointError as error:
        return str(error)
    raise AssertionError("the save went well")


def assert_usable_again(policy: Policy, saver: Saver, directory: Path) -> None:
    """The old checkpoint is there and nothing else, and the next save works."""
    dist.barrier()
    assert [path.name for path in directory.iterdir()] == ["step_000001"]
    dist.barrier()
    saver.save(policy, directory, state(3), keep=2, in_background=True)
    assert saver.finished(wait=True) == [directory / "step_000003"]
    assert newest_whole(directory) == (directory / "step_000003", {})


def test_a_writer_that_is_killed_is_an_error_of_all_ranks(model_dir: Path, tmp_path: Path) -> None:
    def job(policy: Policy) -> str:
        save_checkpoint(policy, tmp_path, state(1), keep=2)
        saver, let_go = Saver(), held_back()
        saver.save(policy, tmp_path, state(2), keep=2, in_background=True)
        if dist.get_rank() == 1:
            writers()[0].kill()
        let_go()
        text = error_of(saver)
        let_go()
        assert_usable_again(policy, saver, tmp_path)
        return text

    first, second = on_layout(model_dir, job, fp32(tensor_parallel=2))
    for text in (first, second):
        assert (
            f"the checkpoint {tmp_path / 'step_000002'} could not be written: rank 1: the process that"
            in text
        )
        assert "writes the checkpoint ended before it had done so. Its tensors take " in text


def test_a_write_that_fails_in_the_background_is_an_error_of_all_ranks(
    model_dir: Path, tmp_path: Path
) -> None:
    def job(policy: Policy) -> str:
        save_checkpoint(policy, tmp_path, state(1), keep=2)
        saver = Saver()
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (PROBE_BYTES + 1, unlimited[1]))
        saver.save(policy, tmp_path, state(2), keep=2, in_background=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        text = error_of(saver)
        assert_usable_again(policy, saver, tmp_path)
        return text

    first, second = on_layout(model_dir, job, fp32(tensor_parallel=2))
    for text in (first, second):
        assert "step_000002 could not be written: rank 1: " in text and ".distcp: File too large. Its" in text


def test_a_rank_that_is_killed_takes_its_writer_along(model_dir: Path, tmp_path: Path) -> None:
    """Otherwise the writer of a dead run would go on beside the run that is started again."""
    pid_file, directory = tmp_path / "pid", tmp_path / "checkpoints"

    def job(policy: Policy) -> None:
        save_checkpoint(policy, directory, state(1), keep=2)
        held_back()
        Saver().save(policy, directory, state(2), keep=2, in_background=True)
        (writer,) = writers()
        wait_until_ignored(writer, signal.SIGTERM)
        pid_file.write_text(str(writer.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError, match="ended without a result"):
        on_layout(model_dir, job)
    pid = int(pid_file.read_text())
    try:
        writer = psutil.Process(pid)
        psutil.wait_procs([writer], timeout=20)
        assert not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        pass
    assert any(path.name.startswith(".writing_step_000002") for path in directory.iterdir())
    assert run_on_ranks(1, lambda rank: newest_whole(directory)) == [(directory / "step_000001", {})]
    on_layout(model_dir, lambda policy: save_checkpoint(policy, directory, state(2), keep=2))
    assert sorted(path.name for path in directory.iterdir()) == ["step_000001", "step_000002"]
