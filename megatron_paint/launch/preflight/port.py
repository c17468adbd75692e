"""The rendezvous address: that of the first node, free there and reachable from the others."""

import errno
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.result import Finding

CHECK = "rendezvous"
TRY_SECONDS = 5.0
PAUSE = 0.2
LISTENING = "0A"  # a socket's state in /proc/net/tcp
SOCKET = re.compile(r"socket:\[(\d+)\]")


class Unusable(Exception):
    """The address cannot be used; the message says why."""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice

    def finding(self, node: str) -> Finding:
        """The same as a finding of a node."""
        return Finding(check=CHECK, ok=False, seen=str(self), advice=self.advice, node=node)


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Host and port of the first node."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_rendezvous(text: str) -> Rendezvous:
    """Of HOST:PORT. Errors: UserError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--rendezvous {text!r} must be HOST:PORT with a port from 1 to 65535: give the first node and the port "
            "that training will use (MASTER_ADDR:MASTER_PORT)"
        )
    return Rendezvous(host=host, port=int(port))


def listen(rendezvous: Rendezvous) -> socket.socket:
    """A socket that listens at the port, on the first node. Errors: Unusable."""
    _must_be_here(rendezvous)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", rendezvous.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        return socket.create_server(("", rendezvous.port), backlog=512)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise Unusable(f"cannot listen at port {rendezvous.port} ({error.strerror})", "give another port") from None
    who = owner(rendezvous.port) or "a process that is not ours to see"
    raise Unusable(f"port {rendezvous.port} is taken by {who}", "end that process, or give another port")


def _must_be_here(rendezvous: Rendezvous) -> None:
    try:
        addresses = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unusable(
            f"host {rendezvous.host} is not known ({error.strerror})", "give a name or address that all nodes know"
        ) from None
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as trial:
            try:
                trial.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
            return
    raise Unusable(
        f"{rendezvous.host} is no address of the first node", "give the first node's name (MASTER_ADDR), or its address"
    )


def reach(rendezvous: Rendezvous, deadline: float) -> None:
    """Waits until somebody listens there. Errors: Unusable at the deadline."""
    began = time.monotonic()
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection(
                (rendezvous.host, rendezvous.port), timeout=min(TRY_SECONDS, max(0.1, left))
            ).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() >= deadline:
            raise Unusable(
                f"cannot reach the first node at {rendezvous} within {time.monotonic() - began:.0f} s ({why})",
                "look at the first node's message; if there is none, at routes, name and firewall between the two",
            )
        time.sleep(PAUSE)


def owner(port: int) -> str:
    """The process that listens at a port, such as 'process 71 (python train.py)'; empty where it cannot be seen."""
    sockets = _listening(port)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {match[1] for fd in os.scandir(process / "fd") if (match := SOCKET.fullmatch(os.readlink(fd.path)))}
            if held & sockets:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                return f"process {process.name} ({command[:80]})"
        except OSError:  # it has ended, or is another user's
            continue
    return ""


def _listening(port: int) -> set[str]:
    """Inodes of the sockets that listen at a port."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes
