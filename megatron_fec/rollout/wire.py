"""Signed messages between trainer and rollout servers, and samples as bytes.

Every message carries an HMAC under the job's key. A request's covers the server's instance, the client's session and a
count that only rises, so that a recorded request can be sent neither again nor to another server; an answer's covers
the request's. The content itself is not secret.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import struct
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_fec.rollout.engine import PackedGroups

MAC, SESSION, COUNT = "X-Fec-Mac", "X-Fec-Session", "X-Fec-Count"
MOST_BYTES = 1 << 30  # of one message; the samples of a poll on a large engine are some 100 MB


class WireError(RuntimeError):
    """A message that cannot be trusted or read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a request's signature covers."""

    path: str
    instance: str
    session: str
    count: int
    body: bytes

    def mac(self, key: bytes) -> str:
        return _mac(key, "request", self.path, self.instance, self.session, str(self.count), body=self.body)


def answer_mac(key: bytes, request_mac: str, status: int, body: bytes) -> str:
    return _mac(key, "answer", request_mac, str(status), body=body)


def same(one: str, other: str) -> bool:
    """In constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


def send(host: str, port: int, request: Request, *, key: bytes, timeout: float) -> tuple[int, bytes]:
    """Status and body of the answer. timeout: seconds until its first byte, and again until its last.

    OSError where the server does not answer; WireError where the answer is not from a holder of the key.
    """
    mac = request.mac(key)
    headers = {MAC: mac, SESSION: request.session, COUNT: str(request.count)}
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("POST", request.path, body=request.body, headers=headers)
        answer = connection.getresponse()
        body = _read(answer, time.monotonic() + timeout)
    except http.client.RemoteDisconnected:
        raise  # an OSError too: the server ended
    except http.client.HTTPException as error:
        raise WireError(f"its answer is not whole ({error!r})") from error
    finally:
        connection.close()
    if not same(answer.headers.get(MAC, ""), answer_mac(key, mac, answer.status, body)):
        raise WireError(f"its answer (HTTP {answer.status}) is not signed with this job's key")
    return answer.status, body


def samples_to_bytes(groups: PackedGroups, more: dict[str, Any]) -> bytes:
    """A JSON head, then token ids and log-probs as they lie in memory. more: what else the answer says."""
    head = {
        "indices": groups.indices,
        "group_sizes": groups.group_sizes,
        "lengths": groups.lengths,
        "logprob_counts": groups.logprob_counts,
        "texts": groups.texts,
        "truncated": groups.truncated,
        "versions": groups.versions,
        "more": more,
    }
    encoded = json.dumps(head).encode()
    arrays = groups.token_ids.astype("<i4").tobytes() + groups.logprobs.astype("<f8").tobytes()
    return struct.pack("<Q", len(encoded)) + encoded + arrays


def samples_from_bytes(data: bytes) -> tuple[PackedGroups, dict[str, Any]]:
    """The inverse; WireError where the parts do not fit together."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        head = json.loads(data[8 : 8 + length])
        more = head.pop("more")
        arrays = memoryview(data)[8 + length :]
        split = 4 * sum(head["lengths"])
        groups = PackedGroups(
            **head,
            token_ids=np.frombuffer(arrays[:split], dtype="<i4").astype(np.int32),
            logprobs=np.frombuffer(arrays[split:], dtype="<f8").astype(np.float64),
        )
        columns = (groups.lengths, groups.logprob_counts, groups.texts, groups.truncated, groups.versions)
        fits = (
            {len(column) for column in columns} == {sum(groups.group_sizes)}
            and len(groups.indices) == len(groups.group_sizes)
            and len(groups.token_ids) == sum(groups.lengths)
            and len(groups.logprobs) == sum(groups.logprob_counts)
        )
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise WireError(f"its samples cannot be read ({error!r})") from error
    if not fits:
        raise WireError("its samples cannot be read (their lengths contradict each other)")
    return groups, more


def _read(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := answer.read1(1 << 20):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline or size > MOST_BYTES:
            raise TimeoutError
    if answer.length:  # of what was announced, this much is missing
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _mac(key: bytes, *parts: str, body: bytes) -> str:
    text = "\n".join(("fec rollout 1", *parts, hashlib.sha256(body).hexdigest()))
    return hmac.new(key, text.encode(), "sha256").hexdigest()
