"""The network interface of ranks that are all on this machine."""

import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's variable
LOOPBACK = ("lo", "lo0")  # names on Linux and on macOS


@contextmanager
def loopback(environ: MutableMapping[str, str]) -> Iterator[None]:
    """Makes gloo use the loopback interface in the meantime, unless the variable is already set.

    Otherwise gloo looks up the name of the host. Where nothing resolves that name, each rank prints a warning.
    """
    name = next((name for _, name in socket.if_nameindex() if name in LOOPBACK), None)
    if name is None or INTERFACE in environ:
        yield
        return
    environ[INTERFACE] = name
    try:
        yield
    finally:
        del environ[INTERFACE]
