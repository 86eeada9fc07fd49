"""A port for a server that is started later, or again at its address."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """A free local port below those that systems give out by themselves: nobody else is given it in the meantime."""
    while True:
        port = random.randint(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
