"""Ports for what a test starts later."""

import itertools
import os
import re
import socket

FIRST, SHARE, SHARES = 15000, 1000, 17  # below 32768, from where on the kernel gives ports out by itself
_numbers = itertools.count(37 * os.getpid())  # another run of the tests on this machine begins elsewhere


def free_port() -> int:
    """A port that nobody listens at, and that no other worker of pytest-xdist and no connection will be given."""
    worker = re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or "0"
    share = FIRST + int(worker) % SHARES * SHARE
    for number in itertools.islice(_numbers, SHARE):
        port = share + number % SHARE
        with socket.socket() as trial:
            try:
                trial.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port from {share} to {share + SHARE - 1} is free")
