"""Rollout servers as processes, started again when they end, and a relay between trainer and server that injects faults."""

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

from run_fixtures import CONFIG, ROOT

from megatron_fec.rollout.engine_folder import EngineAddress, read_addresses, read_key, write_address
from megatron_fec.rollout.wire import COUNT, MAC, SESSION, answer_mac

START_DEADLINE = 180.0  # seconds; 20 to 40 on busy cores


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
