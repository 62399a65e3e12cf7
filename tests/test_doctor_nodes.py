"""What the nodes tell each other, on real stores between forked processes: silence, clocks, folders, bandwidth."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ports import free_port
from ranks import run_on_ranks
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented

from megatron_fec.doctor import _Doctor
from megatron_fec.doctor_bandwidth import check_bandwidth, check_local_gpus, judge_bandwidth, neighbours
from megatron_fec.doctor_nodes import (
    FAULT,
    OK,
    WARNING,
    Finding,
    Node,
    NodeError,
    Nodes,
    check_clocks,
    check_shared_folder,
    judge_clock,
    meet,
)


def node(rank: int = 0, count: int = 2, port: int | None = 0) -> Node:
    return Node(rank=rank, count=count, name=f"n{rank + 1}", job="17", host="127.0.0.1", port=port)


def on_nodes(count: int, job: Callable[[Nodes], Any]) -> list[Any]:
    """job(nodes) of every node, each a forked process."""
    port = free_port()

    def on_rank(rank: int) -> Any:
        nodes = meet(node(rank, count, port), seconds=20)
        nodes.gather("connected", True, seconds=20)  # a group must not go while another rank still connects
        dist.destroy_process_group()  # the doctor makes its own
        result = job(nodes)
        nodes.part(seconds=20)
        return result

    return run_on_ranks(count, on_rank)


@pytest.fixture
def first() -> Nodes:
    """Node 0 of two, of which the other has yet to speak."""
    return meet(node(), seconds=5)


def other(first: Nodes) -> Nodes:
    store = TCPStore("127.0.0.1", first.store.port, is_master=False, wait_for_workers=False)
    return Nodes(node(1), store)


# ------------------------------------------------------------------ silence


def test_every_node_gets_the_values_of_all():
    values = on_nodes(3, lambda nodes: nodes.gather("step", {"rank": nodes.node.rank}, seconds=20))
    assert values == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def test_a_silent_node_is_none_and_is_not_waited_for_again(first: Nodes):
    assert first.gather("one", "a", seconds=0.05) == ["a", None]
    assert not first.are_whole
    other(first).announce("two", "b")
    assert first.gather("two", "a", seconds=1e9) == ["a", None]


def test_a_node_that_spoke_before_it_was_asked_is_heard(first: Nodes):
    other(first).announce("one", "b")
    assert first.gather("one", "a", seconds=0.05) == ["a", "b"]
    assert first.are_whole


def test_the_death_of_node_0_is_named(first: Nodes):
    second = other(first)
    del first.store  # closes the server
    with pytest.raises(NodeError, match=r"the connection to node 0 \(node 0\) at 127\.0\.0\.1:0 is lost"):
        second.gather("one", "b", seconds=30)


def test_a_job_of_several_nodes_needs_an_address():
    with pytest.raises(NodeError, match=r"MASTER_PORT=None must both be set in a job of 2 nodes"):
        meet(node(port=None), seconds=1)


def test_a_check_that_hangs_is_named_and_left_behind(capsys: pytest.CaptureFixture[str]):
    released = threading.Event()
    doctor = _Doctor(node())

    def passes() -> Finding:
        return doctor.node.finding("passes", OK, "")

    def hangs() -> Finding:
        released.wait()
        return passes()

    def breaks() -> Finding:
        raise OSError(5, "Input/output error")

    try:
        doctor.run({"hangs": hangs, "passes": passes, "breaks": breaks}, end=time.monotonic() + 0.2)
    finally:
        released.set()
    assert [(each.check, each.level) for each in doctor.findings] == [
        ("hangs", FAULT),
        ("passes", OK),
        ("breaks", FAULT),
    ]
    output = capsys.readouterr().out
    assert "not done in time: a file system or a device hangs. Look at dmesg of n1" in output
    assert "OSError: [Errno 5] Input/output error" in output


# ------------------------------------------------------------------ clocks


@pytest.mark.parametrize(
    ("offset", "error", "level"),
    [(0.1, 0.001, OK), (-1.9, 0.0, OK), (2.1, 0.05, FAULT), (-3600.0, 0.2, FAULT), (5.0, 4.0, OK)],
)
def test_a_clock_is_judged_by_what_is_certain(offset: float, error: float, level: str):
    """The last one may be 1 s, or 9 s: a slow exchange proves nothing."""
    assert judge_clock(node(1), offset, error).level == level


def test_the_sign_says_whether_the_clock_is_ahead():
    """Node 0's clock shows less than this one's."""
    finding = judge_clock(node(1), -30.0, 0.01)
    assert "+30.000 s from node 0, +- 0.010 s; 2 s are allowed" in finding.text
    assert "chronyd" in finding.text


def test_clocks_of_one_machine_agree():
    findings = on_nodes(3, lambda nodes: check_clocks(nodes, seconds=20))
    assert [each.level for each in findings] == [OK] * 3
    assert findings[0].text == "the reference of the others"
    for each in findings[1:]:
        offset, error = float(each.text.split()[0]), float(each.text.split()[-2])
        assert abs(offset) <= error + 0.001


def test_a_clock_that_is_ahead_is_named():
    """The clock of n2's process is set half a minute forward."""
    true_time = time.time

    def job(nodes: Nodes) -> Finding:
        if nodes.node.rank == 1:
            time.time = lambda: true_time() + 30
        return check_clocks(nodes, seconds=20)

    findings = on_nodes(3, job)
    assert [each.level for each in findings] == [OK, FAULT, OK]
    assert float(findings[1].text.split()[0]) == pytest.approx(30, abs=1)


def test_a_node_that_does_not_ask_for_the_time_is_named(first: Nodes):
    finding = check_clocks(first, seconds=0.05)
    assert (finding.level, finding.text.split(" did")[0]) == (FAULT, "node 1")


# ------------------------------------------------------------------ the shared folder


def test_a_shared_folder_is_made_and_left_empty(tmp_path: Path):
    folder = tmp_path / "a" / "run"
    findings = on_nodes(3, lambda nodes: check_shared_folder(nodes, folder, seconds=20))
    assert [each.level for each in findings] == [OK] * 3
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_shared_is_named_on_both_sides(tmp_path: Path):
    """n2 has another folder, as where /scratch is a local disk; n3 shares that of n1."""

    def job(nodes: Nodes) -> Finding:
        return check_shared_folder(nodes, tmp_path / str(nodes.node.rank % 2), seconds=1.0)

    findings = on_nodes(3, job)
    assert [each.level for each in findings] == [FAULT, FAULT, OK]
    assert "did not see in it what node 1 wrote" in findings[0].text
    assert "did not see in it what node 0 wrote" in findings[1].text
    assert [list((tmp_path / name).iterdir()) for name in "01"] == [[], []]


def test_a_folder_that_one_node_cannot_write_is_its_fault(tmp_path: Path):
    (tmp_path / "file").touch()

    def job(nodes: Nodes) -> Finding:
        folder = tmp_path / ("run" if nodes.node.rank == 0 else "file/run")
        return check_shared_folder(nodes, folder, seconds=1.0)

    findings = on_nodes(2, job)
    assert [each.level for each in findings] == [OK, FAULT]
    assert "file/run cannot be written: Not a directory" in findings[1].text


def test_a_file_with_other_content_is_not_taken_for_the_canary(tmp_path: Path):
    """A cache that shows the name and not yet the content."""

    def job(nodes: Nodes) -> Finding:
        if nodes.node.rank == 0:
            return check_shared_folder(nodes, tmp_path, seconds=1.0)
        nodes.gather("canary", ["stale", "what it should hold"], seconds=1.0)
        (tmp_path / "stale").write_text("what it held before")
        nodes.gather("canary read", True, seconds=5.0)
        return nodes.node.finding("", OK, "")

    assert on_nodes(2, job)[0].level == FAULT


# ------------------------------------------------------------------ bandwidth


@pytest.mark.parametrize("count", [2, 3])
def test_bandwidth_is_measured_between_processes(count: int):
    findings = on_nodes(count, lambda nodes: check_bandwidth(nodes, seconds=30))
    for each in findings:
        assert each.level in (OK, WARNING), each.text  # cores are shared: a slow rank is possible here
        assert f"gloo all-reduce over {count} nodes at " in each.text
        assert float(each.text.split(" at ")[1].split()[0]) > 0


def test_a_node_that_leaves_the_all_reduce_is_a_fault_of_the_others():
    def job(nodes: Nodes) -> Finding | None:
        return check_bandwidth(nodes, seconds=2) if nodes.node.rank == 0 else None

    finding = on_nodes(2, job)[0]
    assert finding.level == FAULT
    assert "the gloo all-reduce over 2 nodes failed: " in finding.text
    assert "Set GLOO_SOCKET_IFNAME" in finding.text


def test_one_node_has_nothing_to_measure():
    assert check_bandwidth(meet(node(count=1), seconds=5), seconds=5).level == OK


@pytest.mark.parametrize(
    ("rates", "backend", "levels"),
    [
        ([40e9, 41e9, 39e9, 40e9], "nccl", [OK, OK, OK, OK]),
        ([40e9, 41e9, 19e9, 40e9], "nccl", [OK, OK, WARNING, OK]),
        ([40e9, 41e9, 2e9, 40e9], "nccl", [OK, OK, FAULT, OK]),
        ([40e9, 99e9, 40e9, 40e9], "nccl", [OK, OK, OK, OK]),  # one that is fast makes nobody slow
        ([4e9, 4e9, 0.2e9], "gloo", [OK, OK, WARNING]),
    ],
)
def test_a_slow_node_is_named_and_its_neighbours_are_not(rates: list[float], backend: str, levels: list[str]):
    count = len(rates)
    findings = [
        judge_bandwidth(node(rank, count), "40 GB/s", rates, backend=backend) for rank in range(count)
    ]
    assert [each.level for each in findings] == levels


@pytest.mark.parametrize("count", range(2, 10))
def test_neighbours_meet_in_pairs_and_every_node_has_two(count: int):
    partners = [neighbours(rank, count) for rank in range(count)]
    for number in range(3):
        met = {rank: own[number] for rank, own in enumerate(partners) if own[number] is not None}
        assert all(met[partner] == rank for rank, partner in met.items() if partner is not None)
        assert all(rank != partner for rank, partner in met.items())
    if count > 2:
        assert all(len(set(own) - {None}) == 2 for own in partners)


@pytest.mark.slow
def test_the_processes_of_one_node_are_measured():
    finding = check_local_gpus(node(), processes=2, backend="gloo", seconds=120)
    assert finding.level == OK, finding.text
    assert "gloo all-reduce over the 2 GPUs of the node at " in finding.text


@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="needs a machine without a GPU")
def test_gpus_that_do_not_work_together_are_a_fault():
    finding = check_local_gpus(node(), processes=2, backend="nccl", seconds=120)
    assert finding.level == FAULT
    assert "nccl all-reduce over the 2 GPUs of the node failed: " in finding.text
