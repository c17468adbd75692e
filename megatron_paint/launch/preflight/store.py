"""How the nodes meet and exchange what they found: torch's TCPStore at the rendezvous address, kept by the first node.

It takes the very port that training will use, and closes it at the end: a port that is taken or that a firewall blocks
is then found here, and no other one has to be free.
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


class Lost(Exception):
    """The first node has gone, or does not answer in time."""


class Meeting:
    """The nodes' common store. Every wait is by short questions, so that a signal is heeded between two of them."""

    def __init__(self, store: "TCPStore") -> None:
        self._store: TCPStore | None = store

    def post(self, key: str, content: str) -> None:
        """Lets all nodes read `content`."""
        self._ask(lambda store: store.set(key, content))

    def count(self, key: str) -> int:
        """The next number, from 1, of all that ask."""
        return self._ask(lambda store: store.add(key, 1))

    def wait_for(self, key: str, deadline: float, *, pause: float = PAUSE, default: str | None = None) -> str:
        """What was posted, as soon as it is. Errors: Lost at the deadline, unless there is a default."""
        while not self._ask(lambda store: store.check([key])):
            if time.monotonic() >= deadline:
                if default is not None:
                    return default
                raise Lost(f"{key} was not posted in time")
            time.sleep(pause)
        return self._ask(lambda store: store.get(key)).decode()

    def collect(self, phase: str, ranks: Iterable[int], deadline: float) -> dict[int, Any]:
        """What nodes posted in a phase, by rank, of those that did by the deadline."""
        texts = {rank: self.wait_for(f"{phase}/{rank}", deadline, default="") for rank in ranks}
        return {rank: json.loads(text) for rank, text in texts.items() if text}

    def close(self) -> None:
        """Leaves; on the first node this frees the port."""
        self._store = None

    def _ask(self, act: Callable[["TCPStore"], Any]) -> Any:
        if self._store is None:
            raise Lost("the meeting is closed")
        try:
            return act(self._store)
        except RuntimeError as error:  # torch's errors of a store that has gone are such
            raise Lost(str(error).strip().splitlines()[0]) from None


def host(rendezvous: port.Rendezvous) -> Meeting:
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
    return Meeting(store)


def join(rendezvous: port.Rendezvous, deadline: float) -> Meeting:
    """On another node. Errors: port.Unusable where nobody answers by the deadline."""
    port.reach(rendezvous, deadline)
    found: list[TCPStore | RuntimeError] = []
    # In a thread, which is given up: torch waits without end for a greeting from what is no store of its own.
    greeting = threading.Thread(target=_greet, args=(rendezvous, found), daemon=True)
    greeting.start()
    greeting.join(max(1.0, deadline - time.monotonic()))
    if not found or isinstance(found[0], RuntimeError):
        why = str(found[0]).strip().splitlines()[0] if found else "it does not answer"
        raise port.Unusable(
            f"what listens at {rendezvous} is no preflight of the first node ({why})",
            "look at the first node's message",
        )
    return Meeting(found[0])


def _greet(rendezvous: port.Rendezvous, found: list["TCPStore | RuntimeError"]) -> None:
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=OPERATION_SECONDS)
    try:
        found.append(
            TCPStore(rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False, timeout=timeout)
        )
    except RuntimeError as error:
        found.append(error)
