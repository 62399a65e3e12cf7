"""Engines and trainer in one allocation: who runs where, and what happens when one of them ends.

The last test is a real one, with vLLM; a stand-in takes the place of Python in the others.
Needs Slurm: `make test-slurm`.
"""

from __future__ import annotations

import json
import sys

import pytest
from cluster import Cluster

from megatron_fec.rollout.engine import vllm_is_available

SCRIPT = "rollout_and_train.sh"
THREE_NODES = ("--nodes=3",)


def test_engines_and_trainer_share_an_allocation(cluster: Cluster):
    env = cluster.stand_in("serve=serve,train=finish", "rollout", DOCTOR="off", ENGINE_NODES="2")
    job = cluster.submit(SCRIPT, "rollout.tensor_parallel=1", options=THREE_NODES, env=env)
    assert job.ended().name == "COMPLETED", job.text()
    engines, (trainer,) = cluster.notes("rollout", "serve"), cluster.notes("rollout")
    places = {}
    for engine in engines:
        line, environment = engine["argv"], engine["environment"]
        options = dict(zip(line[1::2], line[2::2], strict=False))
        places[environment["SLURMD_NODENAME"], environment["CUDA_VISIBLE_DEVICES"]] = options["--bind"]
        assert int(options["--port"]) == int(environment["ENGINE_PORT"]) + int(environment["SLURM_LOCALID"])
        assert {"rollout.tensor_parallel=1", "rollout.engine=servers"} <= set(line)
    # The engines bind to the address of their node, and only to that one.
    assert places == {
        ("n2", "0"): "192.0.2.12",
        ("n2", "1"): "192.0.2.12",
        ("n3", "0"): "192.0.2.13",
        ("n3", "1"): "192.0.2.13",
    }
    assert trainer["environment"]["SLURMD_NODENAME"] == "n1"
    assert {"--nnodes=1", "--nproc-per-node=2", "rollout.engine=servers"} <= set(trainer["argv"])
    key = cluster.folder / "rollout" / "run" / "engines" / "key"
    assert len(bytes.fromhex(key.read_text())) == 32
    assert not [word for note in [*engines, trainer] for word in note["argv"] if key.read_text() in word]


def test_a_dead_engine_is_started_again_within_a_limit(cluster: Cluster):
    env = cluster.stand_in(
        "serve=die,train=finish", "dead", DOCTOR="off", ENGINE_RESTARTS="2", ENGINE_GPUS="2"
    )
    job = cluster.submit(SCRIPT, options=("--nodes=2",), env=env)
    state = job.ended()
    assert state.name == "FAILED"
    assert state.code > 0
    assert len(cluster.notes("dead", "serve")) == 3
    assert "engine 0 on n2 ended with exit code 4: restart 2 of 2" in job.text()
    assert "error: an engine ended before all have answered." in job.text()
    assert cluster.notes("dead") == []


def test_the_engines_end_with_the_trainer(cluster: Cluster):
    env = cluster.stand_in("serve=serve,train=die", "both", DOCTOR="off", ENGINE_GPUS="2")
    job = cluster.submit(SCRIPT, options=("--nodes=2",), env=env)
    state = job.ended(seconds=60)
    assert (state.name, state.code) == ("FAILED", 4)


def test_a_stop_requeues_engines_and_trainer(cluster: Cluster):
    env = cluster.stand_in("serve=serve,train=wait", "again", DOCTOR="off", ENGINE_GPUS="2")
    job = cluster.submit(SCRIPT, options=("--nodes=2",), env=env)
    job.reaches(lambda: cluster.notes("again"))
    first_key = (cluster.folder / "again" / "run" / "engines" / "key").read_text()
    job.signal_shell("USR1")
    job.restarted(1)
    assert job.ended().name == "COMPLETED", job.text()
    assert len(cluster.notes("again", "serve")) == 2
    assert (cluster.folder / "again" / "run" / "engines" / "key").read_text() != first_key


def test_too_few_nodes_are_named(cluster: Cluster):
    job = cluster.submit(SCRIPT, options=("--nodes=1",), env=cluster.stand_in("train=finish", "few"))
    state = job.ended()
    assert (state.name, state.code) == ("FAILED", 2)
    assert "ENGINE_NODES=1 of 1 nodes leave none to train on" in job.text()


@pytest.mark.skipif(not vllm_is_available(), reason="vllm is not installed")
def test_a_run_goes_on_when_its_engine_is_killed(cluster: Cluster):
    run_dir, steps = cluster.folder / "servers", 30
    settings = {
        "policy.tensor_parallel": 1,
        "rollout.prompts_per_step": 8,
        "algorithm.prompts_per_update": 4,
        "algorithm.epochs": 1,
        "data.validation": "null",
        "warm_start.steps": 0,
        "trainer.max_steps": steps,
        "trainer.eval_every": 0,
    }
    env = {
        "CONFIG": "configs/tiny_cpu.yaml",
        "PYTHON": sys.executable,
        "RUN_DIR": str(run_dir),
        "DOCTOR": "off",
    }
    job = cluster.submit(
        SCRIPT,
        *(f"{key}={value}" for key, value in settings.items()),
        options=("--nodes=2",),
        env=env | {"GPUS_PER_NODE": "1", "ENGINE_GPUS": "1", "ENGINE_RESTARTS": "1"},
    )
    metrics = run_dir / "metrics.jsonl"
    job.reaches(lambda: metrics.exists() and metrics.read_text().count("\n") > 1)
    on_its_node = ("srun", f"--jobid={job.id}", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=n2")
    (pid,) = cluster.run(*on_its_node, "pgrep", "--full", "python[^ ]* launch/serve.py").split()
    cluster.run(*on_its_node, "kill", "-KILL", pid)
    assert job.ended().name == "COMPLETED", job.text()
    assert "engine 0 on n2 ended with exit code 137: restart 1 of 1" in job.text()
    assert [json.loads(row)["step"] for row in metrics.read_text().splitlines()] == list(range(steps))
    assert (run_dir / "DONE").exists()
