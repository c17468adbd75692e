"""How the nodes exchange results: torch's TCPStore at the rendezvous address, hosted by the first node.

It uses the port that training will use, and closes it at the end. So a port that is taken, or blocked by a firewall,
is found here, and no second port has to be free.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_paint.launch.preflight import port

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PAUSE = 0.05
OPERATION_SECONDS = 30.0


class StoreLost(Exception):
    """The first node is gone, or does not answer in time."""


class NodeStore:
    """The common store of all nodes. Every wait consists of short questions, so that a signal is handled in between."""

    def __init__(self, store: "TCPStore") -> None:
        self._store: TCPStore | None = store

    def post(self, key: str, content: str) -> None:
        """Lets all nodes read `content`."""
        self._ask(lambda store: store.set(key, content))

    def count(self, key: str) -> int:
        """The next number, starting at 1, over the calls of all nodes."""
        return self._ask(lambda store: store.add(key, 1))

    def wait_for(self, key: str, deadline: float, *, pause: float = PAUSE, default: str | None = None) -> str:
        """Returns what was posted, as soon as it is posted. At the deadline: the default, or StoreLost without one."""
        while not self._ask(lambda store: store.check([key])):
            if time.monotonic() >= deadline:
                if default is not None:
                    return default
                raise StoreLost(f"{key} was not posted in time")
            time.sleep(pause)
        return self._ask(lambda store: store.get(key)).decode()

    def collect(self, phase: str, ranks: Iterable[int], deadline: float) -> dict[int, Any]:
        """What nodes posted in a phase, by rank. A node that posted nothing by the deadline is missing."""
        texts = {rank: self.wait_for(f"{phase}/{rank}", deadline, default="") for rank in ranks}
        return {rank: json.loads(text) for rank, text in texts.items() if text}

    def close(self) -> None:
        """Leaves the store; on the first node this frees the port."""
        self._store = None

    def _ask(self, operation: Callable[["TCPStore"], Any]) -> Any:
        if self._store is None:
            raise StoreLost("the store is closed")
        try:
            return operation(self._store)
        except RuntimeError as error:  # torch raises it for a store that is gone
            raise StoreLost(str(error).strip().splitlines()[0]) from None


def open_store(rendezvous: port.Rendezvous) -> NodeStore:
    """On the first node. Errors: port.Unusable."""
    from torch.distributed import TCPStore

    listener = port.listen(rendezvous)
    try:
        store = TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=OPERATION_SECONDS),
            master_listen_fd=listener.detach(),
        )
    except RuntimeError as error:
        raise port.Unusable(f"{rendezvous} cannot be used ({str(error).strip().splitlines()[0]})") from None
    return NodeStore(store)


def join_store(rendezvous: port.Rendezvous, deadline: float) -> NodeStore:
    """On another node. Errors: port.Unusable if nobody answers by the deadline."""
    port.reach(rendezvous, deadline)
    found: list[TCPStore | RuntimeError] = []
    # In a thread that can be abandoned: torch waits forever for the greeting of a listener that is not its store.
    greeting = threading.Thread(target=_greet, args=(rendezvous, found), daemon=True)
    greeting.start()
    greeting.join(max(1.0, deadline - time.monotonic()))
    if not found or isinstance(found[0], RuntimeError):
        why = str(found[0]).strip().splitlines()[0] if found else "it does not answer"
        raise port.Unusable(
            f"the listener at {rendezvous} is not the preflight of the first node ({why})",
            "read the first node's message",
        )
    return NodeStore(found[0])


def _greet(rendezvous: port.Rendezvous, found: list["TCPStore | RuntimeError"]) -> None:
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=OPERATION_SECONDS)
    try:
        found.append(
            TCPStore(rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False, timeout=timeout)
        )
    except RuntimeError as error:
        found.append(error)
