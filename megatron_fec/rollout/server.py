"""A rollout server: one engine behind a small signed HTTP interface, for the trainer of the same job only.

The engine is used by one thread, the one that calls `run`; handlers hand it work and wait. An error inside the engine
ends the process: its state is unknown then, and whoever started it starts it again.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socketserver
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from megatron_fec.rollout.engine import PackedGroups, Sampling
from megatron_fec.rollout.wire import COUNT, MAC, SESSION, Request, answer_mac, same, samples_to_bytes
from megatron_fec.types import Sample

SOCKET_SECONDS = 30.0  # a client that is silent for longer in the middle of a message is dropped
MOST_REQUEST = 256 << 20  # bytes; a step's prompts are some MB
LOGGED_REFUSALS = 10
Finished = tuple[int, tuple[Sample, ...]]  # place of the prompt in the request, its samples
Answer = tuple[int, bytes]  # HTTP status, body


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPrompt:
    place: int  # in the trainer's list
    token_ids: list[int]
    seed: int


class ServedEngine(Protocol):
    """What a server needs of its engine; see ServedVllm (vllm_server.py)."""

    tensor_parallel: int

    @property
    def is_busy(self) -> bool: ...
    def start(self, prompts: list[ServerPrompt], sampling: Sampling) -> None: ...
    def step(self) -> list[Finished]: ...
    def abort(self) -> None: ...
    def connect(self, init_info: dict[str, Any]) -> None: ...
    def begin_update(self) -> None: ...
    def receive_bucket(self, description: dict[str, Any]) -> str: ...
    def end_update(self, version: int) -> list[int]: ...
    def close(self) -> None: ...


class RefusedError(Exception):
    """A request that does not fit the server's state; nothing has happened."""


class RolloutServer:
    """Answers from its construction on; `run` is what works."""

    def __init__(self, engine: ServedEngine, *, bind: str, port: int, key: bytes) -> None:
        self.instance = secrets.token_hex(8)
        self.key = key
        self._engine = engine
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards all of the following
        self._counts: dict[str, int] = {}  # of each client session, the last
        self._version: int | None = None
        self._job = ""
        self._results: list[Finished] = []
        self._is_busy = False
        self._steps = 0  # of the engine; a busy engine whose steps stand still hangs
        self._pending: Future | None = None  # what /loaded waits for
        self._http = _Http((bind, port), _Handler)
        self._http.app = self
        self.port: int = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def run(self) -> None:
        """Works until `stop`; an error of the engine is raised once those who wait have been told."""
        try:
            while True:
                task = self._next_task()
                if task is None:
                    return
                work, future = task
                try:
                    future.set_result(work())
                except RefusedError as refusal:
                    future.set_exception(refusal)
                except BaseException as error:
                    future.set_exception(error)
                    raise
        finally:
            self._http.shutdown()
            self._http.server_close()

    def stop(self) -> None:
        """From any thread or a signal handler."""
        self._tasks.put(None)

    def answer(self, path: str, payload: dict[str, Any]) -> Answer:
        """What a handler's thread answers to a request that has passed its checks."""
        answers: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "/health": self._health,
            "/generate": self._generate,
            "/results": self._poll,
            "/connect": self._connect,
            "/start": self._start_update,
            "/bucket": self._bucket,
            "/loaded": self._loaded,
            "/finish": self._finish_update,
        }
        if path not in answers:
            return 404, _json(fault=f"{path} is not known")
        try:
            return 200, answers[path](payload)
        except RefusedError as refusal:
            return 409, _json(fault=str(refusal))
        except Exception as error:  # the engine's: the client is told why, then the process ends
            return 500, _json(fault=f"{type(error).__name__}: {error}")

    def is_new(self, session: str, count: int) -> bool:
        """Whether this request was not seen before."""
        with self._changed:
            if count <= self._counts.get(session, 0):
                return False
            self._counts[session] = count
            return True

    # ------------------------------------------------------------------ the engine's thread

    def _next_task(self) -> tuple[Callable[[], Any], Future] | None:
        """The next request; the engine steps while there is none."""
        while True:
            try:
                return self._tasks.get(block=not self._engine.is_busy)
            except queue.Empty:
                finished = self._engine.step()
            with self._changed:
                self._steps += 1
                self._results += finished
                self._is_busy = self._engine.is_busy
                self._changed.notify_all()

    def _begin(self, job: str, version: int, sampling: Sampling, prompts: list[ServerPrompt]) -> None:
        if version != self._version:
            raise RefusedError(f"its weights have version {self._version}, not {version}")
        self._engine.abort()  # of a trainer that is gone
        try:
            self._engine.start(prompts, sampling)
        except ValueError as error:  # vLLM's, of a prompt that does not fit
            raise RefusedError(str(error)) from error
        with self._changed:
            self._job, self._results, self._is_busy = job, [], True

    def _begin_update(self) -> None:
        with self._changed:
            self._version, self._is_busy = None, False
        self._engine.abort()
        self._engine.begin_update()

    def _end_update(self, version: int) -> list[int]:
        checksums = self._engine.end_update(version)
        with self._changed:
            self._version = version
        return checksums

    # ------------------------------------------------------------------ the handlers' threads

    def _call(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._tasks.put((work, future))
        return future

    def _health(self, payload: dict[str, Any]) -> bytes:
        with self._changed:
            return _json(
                version=self._version,
                steps=self._steps,
                busy=self._is_busy,
                tensor_parallel=self._engine.tensor_parallel,
            )

    def _generate(self, payload: dict[str, Any]) -> bytes:
        prompts = [ServerPrompt(**prompt) for prompt in payload["prompts"]]
        sampling = Sampling(**payload["sampling"])
        self._call(lambda: self._begin(payload["job"], payload["version"], sampling, prompts)).result()
        return _json()

    def _poll(self, payload: dict[str, Any]) -> bytes:
        job, after = payload["job"], payload["after"]
        with self._changed:
            self._changed.wait_for(
                lambda: self._job != job or len(self._results) > after or not self._is_busy,
                timeout=payload["wait"],
            )
            if self._job != job:
                raise RefusedError("it works on another request")
            more = {"steps": self._steps, "busy": self._is_busy}
            new = self._results[after:]
        groups = PackedGroups.of([samples for _, samples in new], [place for place, _ in new])
        return samples_to_bytes(groups, more)

    def _connect(self, payload: dict[str, Any]) -> bytes:
        self._pending = self._call(lambda: self._engine.connect(payload))
        return _json()

    def _start_update(self, payload: dict[str, Any]) -> bytes:
        self._call(self._begin_update).result()
        return _json()

    def _bucket(self, payload: dict[str, Any]) -> bytes:
        """Answers before the bucket has come: the trainer sends it when it knows that it is awaited."""
        self._pending = self._call(lambda: self._engine.receive_bucket(payload))
        return _json()

    def _loaded(self, payload: dict[str, Any]) -> bytes:
        """What became of the last connection or bucket."""
        if self._pending is None:
            raise RefusedError("nothing was to be received")
        return _json(fault=self._pending.result() or "")

    def _finish_update(self, payload: dict[str, Any]) -> bytes:
        return _json(checksums=self._call(lambda: self._end_update(payload["version"])).result())


class _Http(socketserver.ThreadingTCPServer):
    app: RolloutServer
    allow_reuse_address = True  # a server that is started again takes its port back
    daemon_threads = False  # answers that are under way are finished before the process ends
    refusals = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not the server's fault."""


class _Handler(BaseHTTPRequestHandler):
    server: _Http  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = SOCKET_SECONDS

    def do_POST(self) -> None:
        app = self.server.app
        try:
            length, count = int(self.headers.get("Content-Length", "")), int(self.headers.get(COUNT, ""))
        except ValueError:
            return self._refuse(400)
        if not 0 <= length <= MOST_REQUEST:
            return self._refuse(413)
        mac, session = self.headers.get(MAC, ""), self.headers.get(SESSION, "")
        request = Request(
            path=self.path,
            instance=app.instance,
            session=session,
            count=count,
            body=self.rfile.read(length),
        )
        if not same(mac, request.mac(app.key)) or not app.is_new(session, count):
            return self._refuse(401)
        if self.path == "/quit":
            self._reply(200, b"{}", mac)
            self.wfile.flush()
            os._exit(1)  # whatever the engine's thread is caught in
        status, body = app.answer(self.path, json.loads(request.body))
        return self._reply(status, body, mac)

    def _reply(self, status: int, body: bytes, mac: str) -> None:
        self.send_response(status)
        self.send_header(MAC, answer_mac(self.server.app.key, mac, status, body))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int) -> None:
        """Without a signature or a reason: this client does not have the key."""
        self.server.refusals += 1
        if self.server.refusals <= LOGGED_REFUSALS:
            print(
                f"refused a request from {self.client_address[0]} (HTTP {status})",
                file=sys.stderr,
                flush=True,
            )
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a request would fill the log."""


def _json(**values: Any) -> bytes:
    return json.dumps(values).encode()
