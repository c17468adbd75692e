"""Prints an error of many ranks once: the ranks ask a common store which of them prints it."""

import hashlib
import os
import socket
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.launch.rank_environment import RankEnvironment

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = 60.0  # seconds that a rank waits for rank 0 to start
LINGER = 10.0  # seconds that the host of the store waits for the other ranks
COURTESY = 5.0  # seconds that other ranks wait for rank 0, because a job's console shows the output of rank 0
_hosted: "TCPStore | None" = None


def host_store(environment: RankEnvironment) -> None:
    """Lets rank 0 host the store for its lifetime, unless torchrun hosts one.

    torch's own store in the same process shares it, so that an error after the end of torch's store is still printed
    once. Errors: UserError if the port is taken.
    """
    global _hosted
    if environment.rank == 0 and environment.size > 1 and not _torchrun_hosts_it() and _hosted is None:
        try:
            _hosted = _open(environment, hosts=True)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(
                f"rank 0 cannot listen at MASTER_ADDR={environment.address} MASTER_PORT={environment.port} ({why}): "
                "set MASTER_PORT to a free port of that host, the same on every rank"
            ) from None


def print_once(message: str, environment: RankEnvironment) -> None:
    """Prints a message on stderr: on rank 0 if it has the same message, else on the first rank that has it."""
    store, key = None, _key(message)
    try:
        host_store(environment)
        store = _hosted or _join(environment)
        if store is not None and environment.rank > 0:
            _let_rank_0_come_first(store, key)
        first = store is None or store.add(key, 1) == 1
    except (UserError, OSError, RuntimeError):  # rank 0 is gone: printing twice is better than not at all
        first = True
    if first:
        print(message, file=sys.stderr, flush=True)
    deadline = time.monotonic() + LINGER
    while _hosted is not None and _hosted.add(key, 0) < environment.size and time.monotonic() < deadline:
        time.sleep(0.05)


def _key(message: str) -> str:
    return f"megatron_paint/{hashlib.sha256(message.encode()).hexdigest()}"


def _let_rank_0_come_first(store: "TCPStore", key: str) -> None:
    deadline = time.monotonic() + COURTESY
    while store.add(key, 0) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)


def _torchrun_hosts_it() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _join(environment: RankEnvironment) -> "TCPStore | None":
    """Joins the store; None if nobody answers. Waits without torch, whose wait would print many lines."""
    import torch.distributed  # noqa: F401  # takes seconds: done while rank 0 starts, not while rank 0 waits for this rank

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            socket.create_connection((environment.address, environment.port), timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return _open(environment, hosts=False)
    return None


def _open(environment: RankEnvironment, *, hosts: bool) -> "TCPStore":
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=PATIENCE)
    return TCPStore(
        environment.address,
        environment.port,
        is_master=hosts,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
