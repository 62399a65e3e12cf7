"""What the launchers do as jobs: exit codes, requeues, arrays, chains, containers. A stand-in takes the place of Python.

Needs Slurm: `make test-slurm`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, Job

SEVEN = "train_qwen7b.sh"
TWO_NODES = ("--nodes=2",)


def run_dirs(cluster: Cluster, name: str) -> list[str]:
    """The run folder of every trainer that started, in order."""
    return [
        word.removeprefix(f"trainer.run_dir={cluster.folder}/{name}/run").lstrip("/")
        for note in cluster.notes(name)
        for word in note["argv"]
        if word.startswith("trainer.run_dir=")
    ]


def test_a_job_starts_the_preflight_and_one_torchrun_a_node(cluster: Cluster):
    override = 'data.prompt_column=a b\'s "$HOME" *'
    job = cluster.submit(
        SEVEN, override, options=(*TWO_NODES, "--time=30"), env=cluster.stand_in("train=finish", "one")
    )
    assert job.ended().name == "COMPLETED", job.text()
    assert "job 1: finished" in job.text().replace(f"job {job.id}", "job 1")
    doctors, trainers = cluster.notes("one", "doctor"), cluster.notes("one")
    assert sorted(note["environment"]["SLURMD_NODENAME"] for note in doctors) == ["n1", "n2"]
    assert len(trainers) == 2
    for rank, note in enumerate(sorted(trainers, key=lambda note: note["environment"]["SLURM_PROCID"])):
        line, port = note["argv"], str(6000 + int(job.id) % 1000)
        assert line[:6] == ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=2",
                            "--rdzv-backend=static"]  # fmt: skip
        assert f"--master-addr=n1 --master-port={port}" in " ".join(line)
        assert override in line
        assert note["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"
        end_time = float(line[line.index("--end-time") + 1])
        assert abs(end_time - time.time() - 30 * 60) < 60
    assert all(
        note["argv"][:3] == ["launch/doctor.py", "--config", "configs/tiny_cpu.yaml"] for note in doctors
    )


def test_a_failed_preflight_stops_the_job(cluster: Cluster):
    job = cluster.submit(SEVEN, env=cluster.stand_in("doctor=die,train=finish", "ill"))
    state = job.ended()
    assert (state.name, state.restarts) == ("FAILED", 0)
    assert state.code > 0
    assert "error: the preflight found a fault" in job.text()
    assert cluster.notes("ill") == []


def test_the_preflight_can_be_left_out(cluster: Cluster):
    job = cluster.submit(SEVEN, env=cluster.stand_in("doctor=die,train=finish", "well", DOCTOR="off"))
    assert job.ended().name == "COMPLETED", job.text()


def test_one_failed_node_ends_all_and_the_job_fails(cluster: Cluster):
    env = cluster.stand_in("train=fail", "fail", DOCTOR="off")  # the first node would wait for ever
    job = cluster.submit(SEVEN, options=TWO_NODES, env=env)
    state = job.ended(seconds=30)
    assert (state.name, state.restarts) == ("FAILED", 0)
    assert state.code > 0
    assert f"failed with exit code {state.code}" in job.text()


def test_a_stop_during_the_preflight_requeues(cluster: Cluster):
    env = cluster.stand_in("doctor=wait,train=finish", "early")
    run_dir = Path(env["RUN_DIR"])
    run_dir.mkdir()
    (run_dir / "DONE").touch()  # of an earlier, shorter run: whether this one is done only its trainer knows
    job = cluster.submit(SEVEN, env=env)
    _reach(job, cluster, "early", "doctor")
    job.signal_shell("USR1")
    job.restarted(1)
    assert job.ended().name == "COMPLETED", job.text()
    assert len(cluster.notes("early")) == 1  # no trainer before the requeue


def test_requeues_are_bounded(cluster: Cluster):
    env = cluster.stand_in("train=stop", "bound", DOCTOR="off", MAX_RESTARTS="1")
    job = cluster.submit(SEVEN, env=env)
    job.restarted(1)
    state = job.ended()
    assert (state.name, state.code, state.restarts) == ("FAILED", 1, 1)
    assert "back into the queue for restart 1 of 1" in job.text()
    assert "MAX_RESTARTS=1 allows no other restart" in job.text()
    # Requeued by others, it ends before it starts anything.
    cluster.run("scontrol", "requeue", job.id)
    assert job.ended().restarts == 2
    assert "this is restart 2, and MAX_RESTARTS=1" in job.text()
    assert len(cluster.notes("bound")) == 2


def test_slurm_sends_the_signal_of_the_script(cluster: Cluster):
    """Not by scancel: the time limit is nearer than the lead in the script, of which the job warns."""
    job = cluster.submit(
        SEVEN, options=("--time=10",), env=cluster.stand_in("train=wait", "limit", DOCTOR="off")
    )
    job.restarted(1)
    assert job.ended().name == "COMPLETED", job.text()
    assert "warning: the job has less time than the 1200 s of --signal" in job.text()
    assert "USR1: asking all ranks to stop" in job.text()


def test_a_job_that_cannot_be_requeued_says_so(cluster: Cluster):
    env = cluster.stand_in("train=stop", "forbidden", DOCTOR="off")
    job = cluster.submit(SEVEN, options=("--no-requeue",), env=env)
    state = job.ended()
    assert (state.name, state.code, state.restarts) == ("FAILED", 1, 0)
    assert "error: the job cannot be requeued here. Submit it again: it resumes." in job.text()


def test_one_job_at_a_time_trains_in_a_run_folder(cluster: Cluster):
    env = cluster.stand_in("train=wait", "twice", DOCTOR="off")
    first = cluster.submit(SEVEN, env=env)
    _reach(first, cluster, "twice")
    second = cluster.submit(SEVEN, env=env)
    state = second.ended()
    assert (state.name, state.code) == ("FAILED", 2)
    assert f"error: job {first.id} trains in {env['RUN_DIR']}. Use another RUN_DIR" in second.text()
    cluster.run("scancel", first.id)
    third = cluster.submit(SEVEN, env=env | {"STAND_IN": "train=finish"})  # the first may be ending still
    assert third.ended().name == "COMPLETED", third.text()


def test_a_cancelled_job_does_not_come_back(cluster: Cluster):
    job = cluster.submit(SEVEN, env=cluster.stand_in("train=wait", "gone", DOCTOR="off"))
    _reach(job, cluster, "gone")
    cluster.run("scancel", job.id)
    state = job.ended()
    assert (state.name, state.restarts) == ("CANCELLED", 0)
    assert "ended from outside" in job.text()


def test_an_array_runs_seeds_and_stops_one_at_a_time(cluster: Cluster):
    """One task of an array bears the id of the whole array: neither its stop nor its requeue may reach the others."""
    env = cluster.stand_in("train=wait", "array", DOCTOR="off")
    base = cluster.submit(SEVEN, "trainer.seed=9", options=("--array=1-2",), env=env)
    one, two = (Job(cluster=cluster, id=f"{base.id}_{task}", output=base.output) for task in (1, 2))
    for job, other, count in ((one, two, 2), (two, one, 3)):
        _reach(job, cluster, "array", count=count)
        before = other.state()
        job.signal_shell("USR1")
        job.restarted(1)
        assert job.ended().name == "COMPLETED", job.text()
        after = other.state()
        assert (after.name, after.restarts) == (before.name, before.restarts)
    notes = cluster.notes("array")
    assert sorted(run_dirs(cluster, "array")) == ["seed_1", "seed_1", "seed_2", "seed_2"]
    seeds = [[word for word in note["argv"] if word.startswith("trainer.seed=")][-1] for note in notes]
    assert sorted(seeds) == ["trainer.seed=1", "trainer.seed=1", "trainer.seed=2", "trainer.seed=2"]


@pytest.mark.parametrize("kind", ["singleton", "afterany"])
def test_a_chain_goes_on_where_the_job_before_has_stopped(cluster: Cluster, kind: str):
    env = cluster.stand_in("train=stop", kind, DOCTOR="off", REQUEUE="off")
    jobs: list[Job] = []
    for action in ("stop", "die", "finish"):
        dependency = "singleton" if kind == "singleton" else f"afterany:{jobs[-1].id}" if jobs else ""
        options = (f"--job-name={kind}", *([f"--dependency={dependency}"] if dependency else []))
        jobs.append(cluster.submit(SEVEN, options=options, env=env | {"STAND_IN": f"train={action}"}))
    assert [job.ended().name for job in jobs] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [note["environment"]["SLURM_JOB_ID"] for note in cluster.notes(kind)] == [job.id for job in jobs]
    assert "REQUEUE=off leaves the rest to the next job" in jobs[0].text()
    assert "finished" in jobs[2].text()


def test_containers_only_when_asked(cluster: Cluster):
    image = {"CONTAINER_IMAGE": "registry#fec:1", "CONTAINER_MOUNTS": "/data:/data"}
    env = cluster.stand_in("train=finish", "container", **image)
    job = cluster.submit(SEVEN, env=env)
    assert job.ended().name == "COMPLETED", job.text()
    for role in ("doctor", "train"):
        (note,) = cluster.notes("container", role)
        assert note["environment"]["FAKE_PYXIS_CONTAINER_IMAGE"] == "registry#fec:1"
        assert note["environment"]["FAKE_PYXIS_CONTAINER_MOUNTS"] == f"{ROOT}:{ROOT},/data:/data"
    assert not [name for name in cluster.notes("one")[0]["environment"] if name.startswith("FAKE_PYXIS")]


def test_the_number_of_processes_a_node_can_be_chosen(cluster: Cluster):
    job = cluster.submit(SEVEN, env=cluster.stand_in("train=finish", "four", GPUS_PER_NODE="4"))
    assert job.ended().name == "COMPLETED", job.text()
    assert "--nproc-per-node=4" in cluster.notes("four")[0]["argv"]


def test_a_job_submitted_from_elsewhere_needs_the_repository(cluster: Cluster):
    script, env = str(ROOT / "slurm" / SEVEN), cluster.stand_in("train=finish", "else", DOCTOR="off")
    line = ("sbatch", "--parsable", "--gpus-per-node=2", script)
    outputs = [cluster.folder / f"else{number}.out" for number in range(2)]
    states = []
    for output, more in zip(outputs, ({}, {"FEC_ROOT": str(ROOT)}), strict=True):
        command = ("env", f"--chdir={cluster.folder}", *line[:2], f"--output={output}", *line[2:])
        states.append(
            Job(cluster=cluster, id=cluster.run(*command, env=env | more).strip(), output=output).ended()
        )
    assert [state.name for state in states] == ["FAILED", "COMPLETED"]
    assert "Submit from the repository, or set FEC_ROOT to it." in outputs[0].read_text()


def _reach(job: Job, cluster: Cluster, name: str, role: str = "train", count: int = 1) -> None:
    """Waits until so many processes of a role have started."""
    job.reaches(lambda: len(cluster.notes(name, role)) >= count, seconds=60)
