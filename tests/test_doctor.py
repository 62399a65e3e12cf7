"""The doctor on two "nodes" of this machine, each a process with Slurm's variables, and what happens when one is ill."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from ports import free_port
from run_fixtures import COMMAND, CONFIG, ROOT, in_own_session
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented

pytestmark = pytest.mark.slow  # each starts processes that import torch

DEADLINE = 200.0  # for a whole examination; those with a config import megatron-core
WITH_CONFIG = ["--deadline", "120", "--config", CONFIG, "rollout.engine=native"]
SECRET = "planted-7f3a91"
SECRETS = {
    "WANDB_API_KEY": SECRET,
    "HF_TOKEN": SECRET,
    "NCCL_PLANTED": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
}


@contextmanager
def doctor(
    rank: int, count: int, port: int, *arguments: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The examination of node `rank`, called n1, n2, ..., in a session of its own, which is gone at the end."""
    slurm = {
        "SLURM_NODEID": str(rank),
        "SLURM_NNODES": str(count),
        "SLURM_JOB_ID": "17",
        "SLURMD_NODENAME": f"n{rank + 1}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), *arguments]
    with in_own_session(command, slurm | environment) as child:
        yield child


def outcomes(children: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, output) of each."""
    found = []
    for child in children:
        text, _ = child.communicate(timeout=DEADLINE)
        found.append((child.returncode, text))
    return found


def examined(*arguments: Sequence[str], environments: Sequence[dict[str, str]] = ()) -> list[tuple[int, str]]:
    """Outcomes of a job with one node for each list of arguments; its port is free for torchrun at once."""
    port, count = free_port(), len(arguments)
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                doctor(rank, count, port, *own, **(environments[rank] if environments else {}))
            )
            for rank, own in enumerate(arguments)
        ]
        found = outcomes(children)
    TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    return found


def lines(text: str, level: str) -> list[list[str]]:
    """[node, check, text] of the checks that ended so."""
    rows = [
        re.split(r"\s+", line, maxsplit=3) for line in text.splitlines() if not line.startswith("doctor:")
    ]
    return [[row[0], row[2], row[3]] for row in rows if row[1:2] == [level]]


# ------------------------------------------------------------------ a job that may start


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    run_dir = tmp_path_factory.mktemp("healthy") / "run"
    arguments = [*WITH_CONFIG, f"trainer.run_dir={run_dir}", "trainer.wandb=online"]
    return run_dir, examined(arguments, arguments, environments=[SECRETS, SECRETS])


def test_a_healthy_job_passes_with_a_line_for_each_check_and_node(
    healthy: tuple[Path, list[tuple[int, str]]],
):
    _, found = healthy
    checks = [
        "config",
        "packages",
        "gpus",
        "shared-memory",
        "open-files",
        "variables",
        "imports",
        "wandb",
        "engine",
        "model",
        "disk",
        "checkpoint",
        "data.train",
        "data.validation",
        "same-packages",
        "clock",
        "shared-folder",
        "bandwidth",
    ]
    for name, (code, text) in zip(("n1", "n2"), found, strict=True):
        assert code == 0, text
        assert lines(text, "FAULT") == []
        passed = lines(text, "ok") + lines(text, "warning")
        assert sorted(check for _, check, _ in passed) == sorted(checks)
        assert {node for node, _, _ in passed} == {name}
    assert "doctor: 2 of 2 nodes answered, 36 checks" in found[0][1]
    assert "doctor:" not in found[1][1]


def test_a_healthy_job_leaves_nothing_in_the_run_folder(healthy: tuple[Path, list[tuple[int, str]]]):
    assert list(healthy[0].iterdir()) == []


def test_no_secret_is_printed(healthy: tuple[Path, list[tuple[int, str]]]):
    for _, text in healthy[1]:
        assert SECRET not in text
        assert "NCCL_PLANTED (set)" in text  # the line is there, and its value is not


def test_clocks_of_one_machine_agree(healthy: tuple[Path, list[tuple[int, str]]]):
    [clock] = [text for _, check, text in lines(healthy[1][1][1], "ok") if check == "clock"]
    offset, error = map(float, re.findall(r"([+-]?\d+\.\d+) s", clock))
    assert abs(offset) <= error + 0.001


# ------------------------------------------------------------------ a job that must not


def test_two_faults_of_one_node_are_named_and_stop_both(tmp_path: Path):
    """n2 has the run folder on a disk of its own, and no data."""
    found = examined(
        [*WITH_CONFIG, f"trainer.run_dir={tmp_path / 'shared'}"],
        [*WITH_CONFIG, f"trainer.run_dir={tmp_path / 'own'}", f"data.train={tmp_path / 'none.jsonl'}"],
    )
    assert [code for code, _ in found] == [1, 1]
    faults = {(node, check): text for _, text in found for node, check, text in lines(text, "FAULT")}
    assert set(faults) == {("n2", "data.train"), ("n1", "shared-folder"), ("n2", "shared-folder")}
    assert "none.jsonl does not exist" in faults["n2", "data.train"]
    assert f"{tmp_path / 'own'} is not shared" in faults["n2", "shared-folder"]
    assert "did not see in it what n1 wrote" in faults["n2", "shared-folder"]
    summary = [line for line in found[0][1].splitlines() if line.startswith("doctor: n")]
    assert len(summary) == 3


def test_a_package_of_another_version_on_one_node_is_named(tmp_path: Path):
    """A folder early on the path of n2 holds another omegaconf, as a stray user installation would."""
    stray = tmp_path / "stray" / "omegaconf-1.4.1.dist-info"
    stray.mkdir(parents=True)
    (stray / "METADATA").write_text("Metadata-Version: 2.1\nName: omegaconf\nVersion: 1.4.1\n")
    path = os.pathsep.join(filter(None, [str(stray.parent), os.environ.get("PYTHONPATH")]))
    found = examined([], [], environments=[{}, {"PYTHONPATH": path}])
    assert [code for code, _ in found] == [1, 1]
    assert lines(found[0][1], "FAULT") == []
    faults = {check: text for _, check, text in lines(found[1][1], "FAULT")}
    assert "omegaconf is 1.4.1 and must be >=2.3" in faults["packages"]
    assert re.search(r"omegaconf is 1\.4\.1 here and \S+ on n1", faults["same-packages"])
    assert "doctor: n2" in found[0][1]


def test_a_node_that_never_arrives_is_named(tmp_path: Path):
    """By its name in Slurm's list, which scontrol writes out."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_STEP_NODELIST": "",
    }
    port = free_port()
    with doctor(0, 2, port, "--deadline", "3", **environment) as child:
        [(code, text)] = outcomes([child])
    assert code == 1
    [[node, check, fault]] = lines(text, "FAULT")
    assert (node, check) == ("n2", "arrival")
    assert f"node 1 of 2 never arrived at 127.0.0.1:{port}" in fault
    assert "doctor: 1 of 2 nodes answered" in text
    assert "stopped answering" not in text  # it is named once


def test_a_port_on_which_nobody_listens_is_named():
    """Node 1 of a job whose node 0 is dead."""
    port = free_port()
    with doctor(1, 2, port, "--deadline", "2") as child:
        [(code, text)] = outcomes([child])
    assert code == 1
    [[node, check, fault]] = lines(text, "FAULT")
    assert (node, check) == ("n2", "rendezvous")
    assert f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port} was not reachable for 2 s" in fault
    assert "Connection refused" in fault


def test_a_port_that_another_process_holds_is_named():
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with doctor(0, 2, port, "--deadline", "2") as child:
            [(code, text)] = outcomes([child])
    assert code == 1
    [[_, check, fault]] = lines(text, "FAULT")
    assert check == "rendezvous"
    assert f"node 0 cannot listen at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}" in fault


def test_a_node_that_dies_on_the_way_is_named():
    """n2 is killed at its first line, which it prints after it has arrived."""
    port = free_port()
    with doctor(0, 2, port, "--deadline", "20") as first, doctor(1, 2, port, "--deadline", "20") as second:
        assert second.stdout is not None
        assert second.stdout.readline().startswith("n2 ")
        os.killpg(second.pid, signal.SIGKILL)
        [(code, text)] = outcomes([first])
    assert code == 1
    assert "doctor: n2 stopped answering" in text


def test_a_config_that_cannot_be_read_is_a_fault(tmp_path: Path):
    """Of the node that cannot read it, with the line that the run would end with."""
    [(code, text)] = examined(["--config", str(tmp_path / "none.yaml")])
    assert code == 1
    [[node, check, fault]] = lines(text, "FAULT")
    assert (node, check) == ("n1", "config")
    assert "none.yaml does not exist" in fault


def test_the_command_wants_the_versions_of_the_lock(tmp_path: Path):
    """megatron-fec doctor on this machine, without Slurm."""
    lock = tmp_path / "own.lock"
    lock.write_text("# my environment\nomegaconf==0.0.1\nno_such-package==3.1\n")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))
    }
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, "doctor", "--lock", str(lock)],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 1, result.stderr
    [[_, check, fault]] = lines(result.stdout, "FAULT")
    assert check == "packages"
    assert re.search(r"omegaconf is \S+, tested 0\.0\.1", fault)
    assert "no-such-package is not installed, wanted 3.1" in fault
