"""One training run through everything that a cluster does to it, on a real Slurm, over two of three nodes.

The run is told to stop and requeued six times, preempted, loses the node of its batch script, then another by a network
cut, is cancelled and submitted again, finishes, and is evaluated. It must leave what an undisturbed run leaves, bit for bit.
Needs Slurm: `make test-slurm`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster import Cluster, Job
from run_fixtures import assert_same_weights, rows_of

NUM_REQUEUES = 6
SETTINGS = (
    "rollout.engine=native",
    "rollout.prompts_per_step=16",
    "algorithm.prompts_per_update=4",
    "algorithm.epochs=2",
    "algorithm.schedule.total_steps=5000",
    "algorithm.policy_loss=clip+entropy_bonus",  # a policy that never answers right learns from this
    "data.validation=null",
    "warm_start.steps=0",
    "trainer.save_every=4",
    "trainer.eval_every=0",
)
ENVIRONMENT = {"CONFIG": "configs/tiny_cpu.yaml", "PYTHON": sys.executable, "GPUS_PER_NODE": "1"}


@dataclass(slots=True)
class Story:
    """What happened to the run."""

    cluster: Cluster
    run_dir: Path
    jobs: list[Job] = field(default_factory=list)
    faults: dict[str, str] = field(
        default_factory=dict
    )  # name, what the run looked like when it trained again
    steps: int = 0  # of the finished run

    def submit(self, max_steps: int, **more: str) -> Job:
        env = ENVIRONMENT | {"RUN_DIR": str(self.run_dir)} | more
        options = ("--nodes=2", "--job-name=story")
        self.jobs.append(
            self.cluster.submit(
                "train_qwen7b.sh", *SETTINGS, f"trainer.max_steps={max_steps}", options=options, env=env
            )
        )
        return self.jobs[-1]

    def last_step(self) -> int:
        """Of the newest whole row; -1 without one."""
        path = self.run_dir / "metrics.jsonl"
        rows = path.read_text().split("\n")[:-1] if path.exists() else []
        return json.loads(rows[-1])["step"] if rows else -1

    def survives(self, name: str, fault: Callable[[], object]) -> None:
        """Injects a fault that requeues the job, and waits until it trains again."""
        job, count = self.jobs[-1], len(self.faults) + 1
        began = time.monotonic()
        fault()
        job.restarted(count)
        self.trains_on()
        self.faults[name] = f"on {job.state().nodes} again after {time.monotonic() - began:.0f} s"

    def trains_on(self) -> None:
        """Waits for a step more than there are."""
        before = self.last_step()
        self.jobs[-1].reaches(lambda: self.last_step() > before)


@pytest.fixture(scope="module")
def story(cluster: Cluster) -> Story:
    story = Story(cluster=cluster, run_dir=cluster.folder / "story")
    job = story.submit(5000, DOCTOR="off")  # each of its starts would cost ten seconds more
    story.trains_on()
    for number in range(1, NUM_REQUEUES + 1):
        story.survives(f"SIGUSR1 and requeue, number {number}", lambda: job.signal_shell("USR1"))
    story.survives("preemption", lambda: _urgent_job(cluster))
    story.survives("the node of the batch script powered off", lambda: cluster.control("kill-node", "n1"))
    cluster.control("start-node", "n1")
    assert job.state().nodes == "n[2-3]"
    story.survives("network cut", lambda: cluster.run("ip", "link", "set", "veth-n3", "down"))
    cluster.run("ip", "link", "set", "veth-n3", "up")
    cluster.run("scancel", job.id)
    assert job.ended().name == "CANCELLED", job.text()
    story.steps = story.last_step() + 4
    job = story.submit(story.steps)
    assert job.ended().name == "COMPLETED", job.text()
    return story


@pytest.fixture(scope="module")
def undisturbed(story: Story) -> Path:
    alone = Story(cluster=story.cluster, run_dir=story.cluster.folder / "undisturbed")
    job = alone.submit(story.steps)
    state = job.ended()
    assert (state.name, state.restarts) == ("COMPLETED", 0), job.text()
    return alone.run_dir


def _urgent_job(cluster: Cluster) -> None:
    cluster.run(
        "sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )


def test_every_fault_was_survived(story: Story, capsys: pytest.CaptureFixture[str]):
    with capsys.disabled():
        print()
        for name, outcome in story.faults.items():
            print(f"  {name}: {outcome}")
    assert len(story.faults) == NUM_REQUEUES + 3
    assert story.jobs[0].state().restarts == NUM_REQUEUES + 3


def test_a_stop_loses_no_step(story: Story):
    """Each stop by a signal saved its last step, also that of scancel; the next start went on from there."""
    text = story.jobs[0].text()
    assert text.count("stopped by SIGUSR1") >= NUM_REQUEUES
    assert (
        text.count("stopped by SIG") == NUM_REQUEUES + 2
    )  # at the preemption and at scancel it may be SIGTERM
    assert "ended from outside" in text
    assert "resumed from" in story.jobs[1].text()


def test_the_run_finished_with_an_export(story: Story):
    assert (story.run_dir / "DONE").read_text() == f"{story.steps}\n"
    assert (story.run_dir / "hf" / "config.json").is_file()
    assert "doctor: 2 of 2 nodes answered" in story.jobs[1].text()
    assert f"job {story.jobs[1].id}: finished" in story.jobs[1].text()


def test_the_run_equals_an_undisturbed_one(story: Story, undisturbed: Path):
    rows = rows_of(undisturbed)
    assert [row["step"] for row in rows] == list(range(story.steps))
    assert rows_of(story.run_dir) == rows
    assert_same_weights(story.run_dir / "hf", undisturbed / "hf")


def test_the_weights_have_moved(story: Story, undisturbed: Path):
    """So that equal weights say something."""
    with pytest.raises(AssertionError):
        assert_same_weights(undisturbed / "hf", undisturbed / "model")


def test_a_finished_run_has_nothing_left_to_do(story: Story):
    before = (story.run_dir / "metrics.jsonl").read_bytes()
    job = story.submit(story.steps)
    assert job.ended().name == "COMPLETED", job.text()
    assert f"is finished at step {story.steps}" in job.text()
    assert (story.run_dir / "metrics.jsonl").read_bytes() == before


def test_the_export_is_evaluated(story: Story):
    folder = story.cluster.folder / "evaluation"
    env = ENVIRONMENT | {"CONFIG": "configs/evaluation_tiny.yaml"}
    job = story.cluster.submit(
        "evaluate.sh",
        f"model.path={story.run_dir / 'hf'}",
        f"output_dir={folder}",
        "rollout.engine=native",
        env=env,
    )
    assert job.ended().name == "COMPLETED", job.text()
    assert json.loads((folder / "results.json").read_text())
