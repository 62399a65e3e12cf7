"""A port for a test's own server."""

from __future__ import annotations

import random
import socket

BELOW_EPHEMERAL = range(20000, 32000)  # the system gives the ports from 32768 on to any outgoing connection


def free_port() -> int:
    while True:
        port = random.choice(BELOW_EPHEMERAL)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
