"""The nodes of a job as the doctor sees them: who they are, what they tell each other, clocks and the shared folder.

They meet at MASTER_ADDR:MASTER_PORT, where torchrun will meet a minute later. Every wait has an end, after which the
silent node is named: nothing here can hang on a node that is dead.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented

OK, WARNING, FAULT = "ok", "warning", "FAULT"
GRACE = 5.0  # seconds more that the other nodes wait for node 0
PROBE_SECONDS = 2.0  # for one TCP connection
RETRY_SECONDS = 0.1
CLOCK_ROUNDS = 5
CLOCK_LIMIT = 2.0  # seconds


class NodeError(RuntimeError):
    """The nodes cannot talk: what, rule and remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check on one node."""

    node: str
    check: str
    level: str  # OK | WARNING | FAULT
    text: str  # of a FAULT: what, rule, remedy

    def line(self) -> str:
        return f"{self.node:<10}  {self.level:<7}  {self.check:<13}  {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """This machine in its job."""

    rank: int
    count: int
    name: str
    job: str
    host: str | None  # where node 0 listens
    port: int | None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def finding(self, check: str, level: str, text: str) -> Finding:
        return Finding(node=self.name, check=check, level=level, text=text)


def this_node() -> Node:
    """From Slurm's environment, one task a node; a job of one node outside Slurm."""
    environment = os.environ
    port = environment.get("MASTER_PORT")
    return Node(
        rank=int(environment.get("SLURM_NODEID", "0")),
        count=int(environment.get("SLURM_NNODES", "1")),
        name=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        job=environment.get("SLURM_JOB_ID", "local"),
        host=environment.get("MASTER_ADDR"),
        port=int(port) if port else None,
    )


def node_names(count: int) -> list[str]:
    """What Slurm calls the nodes of the job, where it can be asked, else their numbers."""
    names = [f"node {rank}" for rank in range(count)]
    expression = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if expression and shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", expression]
        try:
            listed = subprocess.run(
                command, capture_output=True, text=True, timeout=PROBE_SECONDS
            ).stdout.split()
        except subprocess.TimeoutExpired:
            return names
        if len(listed) == count:
            return listed
    return names


class Nodes:
    """A key-value store on node 0; all values are JSON."""

    def __init__(self, node: Node, store: TCPStore) -> None:
        self.node = node
        self.store = store
        self.names = node_names(node.count)
        self._silent: set[int] = set()

    def gather(self, step: str, value: Any, *, seconds: float) -> list[Any]:
        """Each node's value, the same list on every node; None of a node that said nothing for `seconds`, or earlier."""
        self.announce(step, value)
        if self.node.rank == 0:
            end = time.monotonic() + seconds
            values = [
                None if rank in self._silent else self._hear(f"{step}/{rank}", end - time.monotonic())
                for rank in range(self.node.count)
            ]
            self.store.set(step, json.dumps(values))
        else:
            values = self._hear(step, 2 * seconds + GRACE)  # node 0 may be late itself by as much as it waits
        if values is None:
            raise NodeError(
                f"node 0 ({self.names[0]}) stopped answering in the step {step!r}. Look at its own output."
            )
        self._silent |= {rank for rank, said in enumerate(values) if said is None}
        return values

    def part(self, *, seconds: float) -> None:
        """The last call: node 0, which holds the store, waits until the others have heard what they asked for."""
        if self.node.rank == 0:
            self.gather("farewell", True, seconds=seconds)
        else:
            self.announce("farewell", True)

    @property
    def are_whole(self) -> bool:
        """Whether every node has answered in every step so far; the same on every node."""
        return not self._silent

    def announce(self, step: str, value: Any) -> None:
        """This node's value, before it is gathered."""
        try:
            self.store.set(f"{step}/{self.node.rank}", json.dumps(value))
        except dist.DistError as error:
            raise self._lost(error) from error

    def _hear(self, key: str, seconds: float) -> Any:
        """The value of a key, None if it does not come in time."""
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.001)))
            return json.loads(self.store.get(key))
        except dist.DistStoreError:
            return None
        except dist.DistError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> NodeError:
        return NodeError(
            f"the connection to node 0 ({self.names[0]}) at {self.node.address} is lost: {str(error).splitlines()[0]}. "
            "Look at its own output."
        )


def meet(node: Node, *, seconds: float) -> Nodes:
    """The nodes, once node 0 listens; a NodeError names host and port."""
    if node.count > 1 and (node.host is None or node.port is None):
        raise NodeError(
            f"MASTER_ADDR={node.host} and MASTER_PORT={node.port} must both be set in a job of {node.count} nodes. "
            "Set them to the first node and a free port, as slurm/common.sh does."
        )
    host, port = node.host or "127.0.0.1", node.port or 0
    timeout = timedelta(seconds=seconds)
    if node.rank == 0:
        try:
            store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)
        except (dist.DistError, RuntimeError) as error:
            raise NodeError(
                f"node 0 cannot listen at MASTER_ADDR:MASTER_PORT={host}:{port}: {str(error).splitlines()[0]}. The port "
                "must be free and the name must be this node's. Choose another MASTER_PORT, or look who holds it."
            ) from error
        return Nodes(node, store)
    _connect(host, port, seconds)
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        raise NodeError(
            f"MASTER_ADDR:MASTER_PORT={host}:{port} takes connections, but is not the doctor of node 0: "
            f"{str(error).splitlines()[0]}. Choose another MASTER_PORT."
        ) from error
    return Nodes(node, store)


def _connect(host: str, port: int, seconds: float) -> None:
    """Returns when a TCP connection is accepted; node 0 may start later than this one."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > end:
                raise NodeError(
                    f"MASTER_ADDR:MASTER_PORT={host}:{port} was not reachable for {seconds:g} s: {error}. Node 0 must "
                    "listen there. Look whether it has started, what the name is here (localhost is each node's own), "
                    "and for a firewall."
                ) from error
        time.sleep(RETRY_SECONDS)


# ------------------------------------------------------------------ clocks


def check_clocks(nodes: Nodes, *, seconds: float) -> Finding:
    """This node's clock against node 0's, by exchanges over the store; the shortest of them decides."""
    node = nodes.node
    if node.rank == 0:
        silent = _answer(nodes, seconds)
        if silent:
            return node.finding("clock", FAULT, f"{', '.join(silent)} did not answer. {_GONE}")
        return node.finding("clock", OK, "the reference of the others")
    offset, error = _offset(nodes, seconds)
    return judge_clock(node, offset, error)


_GONE = "Look at the output of that node; leave it out with --exclude if it is dead."


def judge_clock(node: Node, offset: float, error: float) -> Finding:
    """offset: node 0's clock minus this one's, known to +- error; more than CLOCK_LIMIT for certain is a fault."""
    figure = f"{-offset:+.3f} s from node 0, +- {error:.3f} s"
    if abs(offset) - error > CLOCK_LIMIT:
        return node.finding(
            "clock",
            FAULT,
            f"{figure}; {CLOCK_LIMIT:g} s are allowed, because files and the job's end are compared by time. "
            "Start the time service (chronyd) on this node.",
        )
    return node.finding("clock", OK, figure)


def _answer(nodes: Nodes, seconds: float) -> list[str]:
    """Node 0: the time, as often as each node asks; names of those that did not."""
    silent = []
    for rank in range(1, nodes.node.count):
        patience = 1.0 if silent else seconds  # after one wait of that length the others have asked long ago
        try:
            for number in range(CLOCK_ROUNDS):
                nodes.store.wait([f"clock/{rank}/{number}"], timedelta(seconds=patience))
                nodes.store.set(f"clock/{rank}/{number}/time", repr(time.time()))
        except dist.DistError:
            silent.append(nodes.names[rank])
    return silent


def _offset(nodes: Nodes, seconds: float) -> tuple[float, float]:
    """(node 0's clock minus this one's, largest error of that), in seconds."""
    best = (0.0, float("inf"))
    for number in range(CLOCK_ROUNDS):
        key = f"clock/{nodes.node.rank}/{number}"
        asked = time.time()
        try:
            nodes.store.set(key, "")
            nodes.store.wait([f"{key}/time"], timedelta(seconds=seconds * nodes.node.count + GRACE))
        except dist.DistError as error:
            raise NodeError(f"node 0 ({nodes.names[0]}) did not tell the time: {error}. {_GONE}") from error
        heard = time.time()
        theirs = float(nodes.store.get(f"{key}/time"))
        best = min(best, (theirs - (asked + heard) / 2, (heard - asked) / 2), key=lambda pair: pair[1])
    return best


# ------------------------------------------------------------------ the shared folder


def check_shared_folder(nodes: Nodes, folder: Path, *, seconds: float) -> Finding:
    """Every node writes a file into the folder; all must see that of node 0, and node 0 those of all."""
    node, token, fault = nodes.node, secrets.token_hex(16), ""
    own = folder / f".doctor_{node.job}_{token}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own.write_text(token)
        except OSError as error:
            fault = f"{folder} cannot be written: {error.strerror}. Choose a folder of your own."
        written = nodes.gather("canary", ["", ""] if fault else [own.name, token], seconds=seconds)
        wanted = [pair for pair in (written if node.rank == 0 else written[:1]) if pair and pair[0]]
        unseen = [] if fault else _unseen(folder, wanted, seconds)
        nodes.gather("canary read", True, seconds=2 * seconds)  # only then may the files go
    finally:
        with suppress(OSError):
            own.unlink()
    if unseen:
        names = [name for name, pair in zip(nodes.names, written, strict=True) if pair and pair[0] in unseen]
        fault = (
            f"{folder} is not shared: within {seconds:g} s this node did not see in it what {', '.join(names)} wrote. "
            "The run folder must be one folder on all nodes. Choose one on a shared file system."
        )
    return node.finding(
        "shared-folder", FAULT if fault else OK, fault or f"{folder}: written and read by all"
    )


def _unseen(folder: Path, written: list[list[str]], seconds: float) -> list[str]:
    """Names of files that do not hold their token before the end; a network file system may be late."""
    end = time.monotonic() + seconds
    missing = dict(written)
    while True:
        with suppress(OSError):
            os.listdir(folder)  # a client may remember that a file was absent, until it lists the folder
        for name, token in list(missing.items()):
            with suppress(OSError):
                if (folder / name).read_text() == token:
                    del missing[name]
        if not missing or time.monotonic() > end:
            return list(missing)
        time.sleep(RETRY_SECONDS)
