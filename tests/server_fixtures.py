"""Rollout servers as processes, started again when they end, what their clients are given,
and a relay between the two that injects faults."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_fixtures import CONFIG, ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fec.rollout.engine import PackedGroups, Sampling, true_vocab_size
from megatron_fec.rollout.engine_client import Deadlines
from megatron_fec.rollout.engine_folder import EngineAddress, read_addresses, read_key, write_address
from megatron_fec.rollout.server_engine import ServerEngine
from megatron_fec.rollout.weight_transfer import GlooSender
from megatron_fec.rollout.wire import COUNT, MAC, SESSION, answer_mac, samples_from_bytes, samples_to_bytes
from megatron_fec.types import SampleGroup

START_DEADLINE = 180.0  # seconds; 20 to 40 on busy cores
SAMPLING = Sampling(group_size=3, max_response_tokens=40, temperature=0.8, seed=7)
FAST = Deadlines(answer=20.0, poll=0.2, stall=20.0, transfer=20.0, restart=150.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """launch/serve.py under a supervisor, which starts it again whenever it ends, as a launcher does."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        self.port, self.lines = free_port(), ""
        self.starts = 0  # that have come to answer
        self._run_dir, self._settings = run_dir, settings
        self._changed = threading.Condition()
        self._is_closed = False
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    @property
    def engines(self) -> Path:
        return self._run_dir / "engines"

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def wait(self, starts: int = 1) -> None:
        """Until it has answered this often."""
        with self._changed:
            self._changed.wait_for(lambda: self.starts >= starts or self._is_closed, START_DEADLINE)
            assert self.starts >= starts, self.lines

    def command_line(self) -> bytes:
        return Path(f"/proc/{self.pid}/cmdline").read_bytes()

    def close(self) -> None:
        self._is_closed = True
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._thread.join()

    def _supervise(self) -> None:
        while not self._is_closed:
            before = self.starts
            merged = self._settings | {"trainer.run_dir": self._run_dir}
            self._child = subprocess.Popen(
                [
                    *(sys.executable, str(ROOT / "launch" / "serve.py"), "--config", CONFIG),
                    *("--bind", "127.0.0.1", "--port", str(self.port)),
                    *(f"{key}={value}" for key, value in merged.items()),
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            assert self._child.stdout is not None
            for line in self._child.stdout:
                with self._changed:
                    self.lines += line
                    self.starts += line.startswith("engine ") and line.endswith(" answers\n")
                    self._changed.notify_all()
            self._child.wait()
            with self._changed:
                self._is_closed |= self.starts == before  # it cannot start: again would be no better
                self._changed.notify_all()


@contextmanager
def started_servers(run_dir: Path, settings: dict[str, Any], count: int) -> Iterator[list[Server]]:
    """All of them answer."""
    with ExitStack() as stack:
        servers = [Server(run_dir, settings) for _ in range(count)]
        for server in servers:
            stack.callback(server.close)
        for server in servers:
            server.wait()
        yield servers


class Relay:
    """Stands before servers: a folder of its own names it as the engines, and every message passes through it.

    before(path) may do anything, such as kill the server, and returns False to drop the request; tamper(path, body)
    changes an answer, which is then signed as the server would: it has the key.
    """

    def __init__(self, engines: Path, folder: Path, ports: list[int]) -> None:
        self.key = read_key(engines)
        self.folder = folder
        self.before: dict[int, Callable[[str], bool]] = {}  # by port of the server
        self.tamper: dict[int, Callable[[str, bytes], bytes]] = {}
        self.forged_ports: set[int] = set()  # servers whose answers are not signed
        self._engines = engines
        self._relays = {port: self._listen(port) for port in ports}
        folder.mkdir(parents=True, exist_ok=True)
        os.link(engines / "key", folder / "key")
        self.publish()

    def publish(self) -> None:
        """The servers as they are now, by the relay's address."""
        for address in read_addresses(self._engines, self.key):
            if address.port in self._relays:
                write_address(
                    self.folder, replace(address, port=self._relays[address.port].server_address[1])
                )

    def close(self) -> None:
        for relay in self._relays.values():
            relay.shutdown()
            relay.server_close()

    def _listen(self, port: int) -> socketserver.ThreadingTCPServer:
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not relay.before.get(port, lambda path: True)(self.path):
                    return
                headers = {name: self.headers[name] for name in (MAC, SESSION, COUNT)}
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.request("POST", self.path, body=body, headers=headers)
                    answer = connection.getresponse()
                    status, data = answer.status, answer.read()
                except (OSError, http.client.HTTPException):
                    return  # the client sees a connection that ends
                finally:
                    connection.close()
                data = relay.tamper.get(port, lambda path, data: data)(self.path, data)
                mac = answer_mac(relay.key, self.headers[MAC], status, data)
                if port in relay.forged_ports:
                    mac = "0" * 64
                with suppress(OSError):  # a client that has given up
                    self.send_response(status)
                    self.send_header(MAC, mac)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None: ...

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server


def address_of(folder: Path, port: int) -> EngineAddress:
    """The server at this port, as its file says."""
    (address,) = [one for one in read_addresses(folder, read_key(folder)) if one.port == port]
    return address


def listening(pid: int) -> set[str]:
    """IPv4 and IPv6 addresses on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(entry)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                found.add(socket.inet_ntop(socket.AF_INET if table == "tcp" else socket.AF_INET6, words))
    return found


def gloo(address: str, world_size: int, timeout: float) -> GlooSender:
    return GlooSender(address=address, world_size=world_size, timeout=timeout)


def weights(model_dir: Path, scale: float = 1.0) -> dict[str, Tensor]:
    state = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).state_dict()
    return {name: tensor.detach() * scale for name, tensor in state.items() if name != "lm_head.weight"}


def engine_of(folder: Path, model_dir: Path, said: list[str], **more: Any) -> ServerEngine:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    more = {"deadlines": FAST, "make_sender": gloo} | more
    return ServerEngine(folder, vocab_size=true_vocab_size(tokenizer), is_tied=True, say=said.append, **more)


class FlippingSender(GlooSender):
    """Changes one bit of the first messages on their way."""

    flips = 0

    def send(self, data: Tensor) -> None:
        if FlippingSender.flips > 0:
            FlippingSender.flips -= 1
            data = data.clone()
            data[data.numel() // 2] ^= 4
        super().send(data)


def flipping(address: str, world_size: int, timeout: float) -> FlippingSender:
    return FlippingSender(address=address, world_size=world_size, timeout=timeout)


def assert_same_samples(one: list[SampleGroup], other: list[SampleGroup]) -> None:
    """Token for token; another batch rounds the log-probs otherwise."""
    assert [g.prompt for g in one] == [g.prompt for g in other]
    for a, b in zip(one, other, strict=True):
        assert [s.token_ids for s in a.samples] == [s.token_ids for s in b.samples]
        for x, y in zip(a.samples, b.samples, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


@torch.no_grad()
def largest_error(model_dir: Path, scale: float, groups: list[SampleGroup]) -> float:
    """Of the engines' log-probs against transformers under the scaled weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.load_state_dict(weights(model_dir, scale), strict=False)
    model.tie_weights()
    worst = 0.0
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
            logits = model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1] / SAMPLING.temperature
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            worst = max(worst, (expected - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


def changed(change: Callable[[PackedGroups], PackedGroups]) -> Callable[[str, bytes], bytes]:
    """Tampers with the first answer that holds samples, and with all that follow."""

    def tamper(path: str, body: bytes) -> bytes:
        if path != "/results":
            return body
        groups, more = samples_from_bytes(body)
        return samples_to_bytes(change(groups) if groups.indices else groups, more)

    return tamper


def with_nan(groups: PackedGroups) -> PackedGroups:
    return replace(groups, logprobs=np.full_like(groups.logprobs, np.nan))


def one_sample_short(groups: PackedGroups) -> PackedGroups:
    rows = [samples[:-1] for _, samples in groups.samples()]
    return PackedGroups.of(rows, groups.indices)


def empty(groups: PackedGroups) -> PackedGroups:
    rows = [tuple(replace(s, token_ids=(), logprobs=()) for s in samples) for _, samples in groups.samples()]
    return PackedGroups.of(rows, groups.indices)


def unasked(groups: PackedGroups) -> PackedGroups:
    return replace(groups, indices=[index + 100 for index in groups.indices])


def stale(groups: PackedGroups) -> PackedGroups:
    return replace(groups, versions=[0] * len(groups.versions))


def lost(groups: PackedGroups) -> PackedGroups:
    return PackedGroups.of([], [])
