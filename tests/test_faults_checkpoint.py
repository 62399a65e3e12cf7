"""Whole runs of two ranks under torchrun that are killed, at random moments and while they write, on a slow disk.

Each is started again by the same command and must end as the undisturbed run does, bit for bit.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_fixtures import DEADLINE, ROOT, assert_same_weights, outcome, rows_of, started, train, weights_of

from megatron_fec.policy.checkpoint_files import MANIFEST, find_checkpoints, read_manifest

pytestmark = pytest.mark.slow

STEPS = 12
KILLS = 10
STEPS_BEFORE_A_KILL = 1.5  # at most, after the first step of a start
SHARE_AT_START = 0.4  # of the kills
RUN = {  # a random model never solves a puzzle: a large bonus on entropy gives it something to learn
    "model.path": "embedded",
    "data.train": "embedded:countdown",
    "policy.tensor_parallel": 2,  # so that both ranks write tensors
    "algorithm.policy_loss": "clip+entropy_bonus",
    "algorithm.options.entropy_coef": 0.1,
    "algorithm.prompts_per_update": 2,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "trainer.max_steps": STEPS,
    "trainer.save_every": 1,
    "trainer.keep_checkpoints": 3,
}
IN_BACKGROUND = {"trainer.async_save": True}
FSYNC_DELAY_MS = "100"


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    run_dir: Path
    seconds_to_start: float  # from the ranks' start to the first checkpoint
    seconds_a_step: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with started(run_dir, RUN, 2, "torchrun") as torchrun:
        ranks_of(torchrun)
        times = [time.monotonic()]
        for step in (1, STEPS):
            wait_for(torchrun, lambda step=step: newest_step(run_dir) >= step)
            times.append(time.monotonic())
        text, _ = torchrun.communicate(timeout=DEADLINE)
        assert torchrun.returncode == 0, text
    norms = [row["train_optim/grad_norm"] for row in rows_of(run_dir)]
    assert len(norms) == STEPS and len(set(norms)) == STEPS and min(norms) > 0  # each step trains
    return Undisturbed(
        run_dir=run_dir,
        seconds_to_start=times[1] - times[0],
        seconds_a_step=(times[2] - times[1]) / (STEPS - 1),
    )


def assert_equal_runs(run_dir: Path, undisturbed: Undisturbed) -> None:
    wanted_dir = undisturbed.run_dir
    assert rows_of(run_dir) == rows_of(wanted_dir)
    assert_same_weights(run_dir / "hf", wanted_dir / "hf")
    newest = find_checkpoints(run_dir / "checkpoints")[-1]
    written, wanted = read_manifest(newest), read_manifest(wanted_dir / "checkpoints" / newest.name)
    assert newest.name == f"step_{STEPS:06d}"
    assert {name: digest for name, digest in written.items() if name.endswith(".distcp")} == {
        name: digest for name, digest in wanted.items() if name.endswith(".distcp")
    }


def ranks_of(torchrun: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The rank processes, as soon as all are there."""
    found: dict[int, psutil.Process] = {}
    while len(found) < 2:
        assert torchrun.poll() is None, torchrun.communicate()[0]
        for child in psutil.Process(torchrun.pid).children():
            try:
                environment = child.environ()
            except psutil.Error:  # it has not started its program yet
                continue
            if "LOCAL_RANK" in environment:
                found[int(environment["LOCAL_RANK"])] = child
    return found


def wait_for(
    torchrun: subprocess.Popen[str], condition: Callable[[], Any], seconds: float = DEADLINE
) -> bool:
    """True when the condition holds; False when the run has ended, or after that many seconds."""
    end = time.monotonic() + seconds
    while torchrun.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


def newest_step(run_dir: Path) -> int:
    """0 when there is no checkpoint."""
    return max((int(path.name[5:]) for path in find_checkpoints(run_dir / "checkpoints")), default=0)


def kill_rank(torchrun: subprocess.Popen[str], ranks: dict[int, psutil.Process], rank: int) -> None:
    """Kills that rank alone; torchrun must end the other one and say that it failed."""
    ranks[rank].send_signal(signal.SIGKILL)
    text, _ = torchrun.communicate(timeout=DEADLINE)
    assert torchrun.returncode == 1, text
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=DEADLINE)
    assert not alive


# ------------------------------------------------------------------ at random moments


def killed_at_random(run_dir: Path, chance: random.Random, undisturbed: Undisturbed) -> str:
    """Starts the run and kills a random rank while it starts or after its first step; when, or "" if the run had ended."""
    rank = chance.randrange(2)
    before = newest_step(run_dir)
    while_starting = chance.random() < SHARE_AT_START or before == STEPS
    with started(run_dir, RUN, 2, "torchrun") as torchrun:
        ranks = ranks_of(torchrun)
        if while_starting:
            delay = chance.uniform(0, undisturbed.seconds_to_start)
            wait_for(torchrun, lambda: newest_step(run_dir) > before, delay)
        else:
            delay = chance.uniform(0, STEPS_BEFORE_A_KILL * undisturbed.seconds_a_step)
            wait_for(torchrun, lambda: newest_step(run_dir) > before)
            wait_for(torchrun, lambda: False, delay)
        if torchrun.poll() is not None:
            assert torchrun.returncode == 0, torchrun.communicate()[0]
            return ""
        kill_rank(torchrun, ranks, rank)
    when = "while it starts" if while_starting else "after its first step"
    return f"rank {rank}, {delay:.2f} s {when}, at step {newest_step(run_dir)}"


def test_ten_kills_at_random_moments(undisturbed: Undisturbed, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    chance = random.Random(4)
    kills: list[str] = []
    while len(kills) < KILLS:
        kill = killed_at_random(run_dir, chance, undisturbed)
        kills += [kill] if kill else []
    print("\n".join(kills))
    for kind in ("rank 0", "rank 1", "while it starts", "after its first step"):
        assert any(kind in kill for kill in kills)
    train(run_dir, RUN, processes=2)
    assert_equal_runs(run_dir, undisturbed)
    assert all(path.name.startswith("step_") for path in (run_dir / "checkpoints").iterdir())


# ------------------------------------------------------------------ while a checkpoint is written


@pytest.fixture(scope="module")
def slow_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which every fsync takes a tenth of a second longer, and is logged with every rename."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is there to build the slow disk")
    folder = tmp_path_factory.mktemp("slow_disk")
    library = folder / "slow_disk.so"
    source = ROOT / "tests" / "slow_disk.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "FSYNC_DELAY_MS": FSYNC_DELAY_MS, "FSYNC_LOG": str(folder / "log")}


def killed_while_writing(
    run_dir: Path, settings: dict[str, Any], slow_disk: dict[str, str], *, step: int, rank: int
) -> None:
    """Starts the run and kills a rank when files of that step's checkpoint are there, and the checkpoint is not."""
    directory = run_dir / "checkpoints"
    with started(run_dir, settings, 2, "torchrun", slow_disk) as torchrun:
        ranks = ranks_of(torchrun)
        assert wait_for(torchrun, lambda: [*directory.glob(f".writing_step_{step:06d}_*/*.distcp")])
        kill_rank(torchrun, ranks, rank)
    assert [path.name for path in find_checkpoints(directory)][-1] == f"step_{step - 1:06d}"
    assert len([*directory.glob(f".writing_step_{step:06d}_*")]) == 1


def assert_synced_before_it_counts(log: Path, directory: Path) -> None:
    """From the log of the slow disk: each file, the list of checksums and the folder were synced, then it was renamed."""
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    published = [(n, Path(old), Path(new)) for n, (what, old, new) in enumerate(lines) if what == "rename"]
    published = [(n, old, new) for n, old, new in published if new in find_checkpoints(directory)]
    assert published
    for number, writing, checkpoint in published:
        synced = [path for what, path, _ in lines[:number] if what == "fsync"]
        for path in checkpoint.iterdir():
            assert str(writing / path.name) in synced
        last = [path for path in synced if path.startswith(str(writing))][-2:]
        assert last == [str(writing / MANIFEST), str(writing)]
        assert str(directory) in [path for what, path, _ in lines[number:] if what == "fsync"]


def test_a_kill_while_a_checkpoint_is_written(
    undisturbed: Undisturbed, slow_disk: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    killed_while_writing(run_dir, RUN, slow_disk, step=3, rank=1)
    assert_synced_before_it_counts(Path(slow_disk["FSYNC_LOG"]), run_dir / "checkpoints")
    code, text = outcome(run_dir, RUN, 2, "torchrun")
    assert code == 0, text
    assert f"resumed from {run_dir / 'checkpoints' / 'step_000002'}" in text
    assert_equal_runs(run_dir, undisturbed)
    assert all(path.name.startswith("step_") for path in (run_dir / "checkpoints").iterdir())


def test_a_kill_in_the_background_and_a_checkpoint_that_the_disk_spoils(
    undisturbed: Undisturbed, slow_disk: dict[str, str], tmp_path: Path
) -> None:
    """Saving in the background changes no number; what the disk spoils is named, and the one before it is used."""
    run_dir, settings = tmp_path / "run", RUN | IN_BACKGROUND
    killed_while_writing(run_dir, settings, slow_disk, step=3, rank=0)
    spoiled = run_dir / "checkpoints" / "step_000002" / "__1_0.distcp"
    content = spoiled.read_bytes()
    spoiled.write_bytes(content[:-9])
    code, text = outcome(run_dir, settings, 2, "torchrun")
    assert code == 0, text
    assert f"warning: {spoiled.parent} is damaged, {spoiled.name} does not match its checksum; it is" in text
    assert f"resumed from {run_dir / 'checkpoints' / 'step_000001'}" in text
    assert text.count("\nsaved ") == STEPS - 1
    assert_equal_runs(run_dir, undisturbed)
    assert (run_dir / "checkpoints" / "damaged_step_000002").is_dir()


# ------------------------------------------------------------------ another layout


def test_a_run_of_one_process_goes_on_with_two(tmp_path: Path) -> None:
    """DP 1 -> 2: the sums are taken in another order, so the steps agree to fp32 noise, not bit for bit."""
    settings = RUN | {"policy.tensor_parallel": 1, "trainer.max_steps": 3}
    one = train(tmp_path / "one", settings)
    two = Path(shutil.copytree(one, tmp_path / "two"))
    shutil.rmtree(two / "checkpoints" / "step_000003")
    train(two, settings, processes=2)
    row, wanted = rows_of(two)[-1], rows_of(one)[-1]
    assert rows_of(two)[:-1] == rows_of(one)[:-1]
    assert row != wanted  # it was computed anew
    for name in ("train_rollouts/entropy", "train_optim/loss", "train_optim/grad_norm"):
        assert row[name] == pytest.approx(wanted[name], rel=1e-3)
    one_weights, two_weights = weights_of(one / "hf"), weights_of(two / "hf")
    for name, weight in one_weights.items():
        assert (two_weights[name] - weight).abs().max() < 1e-5, name
