"""One line for an error that many ranks meet: they ask a store of the whole world which of them prints it."""

import hashlib
import os
import socket
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.launch.rank_environment import Place

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = 60.0  # seconds that a rank waits for the first one to come up
LINGER = 10.0  # seconds that the store's host stays for the others
COURTESY = 5.0  # seconds in which rank 0 may come first, whose output is the one that a job's console shows
_hosted: "TCPStore | None" = None


def host_store(place: Place) -> None:
    """Lets rank 0 keep the store from its start to its end, where torchrun keeps none.

    torch's own store of the same process shares it, so that an error after that one is gone is still told once.
    Errors: UserError where the port is taken.
    """
    global _hosted
    if place.rank == 0 and place.size > 1 and not _torchrun_keeps_it() and _hosted is None:
        try:
            _hosted = _open(place, hosts=True)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(
                f"rank 0 cannot listen at MASTER_ADDR={place.address} MASTER_PORT={place.port} ({why}): set "
                "MASTER_PORT to a free port of that host, the same on every rank"
            ) from None


def print_once(message: str, place: Place) -> None:
    """Prints a message on stderr, on rank 0 if it has it too, else on the first of the ranks that have the same one."""
    store, key = None, _key(message)
    try:
        host_store(place)
        store = _hosted or _join(place)
        if store is not None and place.rank > 0:
            _let_rank_0_come_first(store, key)
        first = store is None or store.add(key, 1) == 1
    except (UserError, OSError, RuntimeError):  # rank 0 has gone: a line twice is better than none
        first = True
    if first:
        print(message, file=sys.stderr, flush=True)
    deadline = time.monotonic() + LINGER
    while _hosted is not None and _hosted.add(key, 0) < place.size and time.monotonic() < deadline:
        time.sleep(0.05)


def _key(message: str) -> str:
    return f"megatron_paint/{hashlib.sha256(message.encode()).hexdigest()}"


def _let_rank_0_come_first(store: "TCPStore", key: str) -> None:
    deadline = time.monotonic() + COURTESY
    while store.add(key, 0) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)


def _torchrun_keeps_it() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _join(place: Place) -> "TCPStore | None":
    """The store as a guest; None where nobody answers. torch's own wait would print a page of its own."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            socket.create_connection((place.address, place.port), timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return _open(place, hosts=False)
    return None


def _open(place: Place, *, hosts: bool) -> "TCPStore":
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=PATIENCE)
    return TCPStore(
        place.address, place.port, is_master=hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
