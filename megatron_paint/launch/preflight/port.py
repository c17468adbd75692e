"""The rendezvous address: an address of the first node, with a free port, reachable from the other nodes."""

import errno
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.result import CheckResult

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

    def result(self, node: str) -> CheckResult:
        """The error as a check result of a node."""
        return CheckResult(check=CHECK, ok=False, seen=str(self), advice=self.advice, node=node)


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Host and port of the first node."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_rendezvous(text: str) -> Rendezvous:
    """Reads HOST:PORT. Errors: UserError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--rendezvous {text!r} must be HOST:PORT with a port from 1 to 65535: give the first node and the port "
            "that training will use (MASTER_ADDR:MASTER_PORT)"
        )
    return Rendezvous(host=host, port=int(port))


def listen(rendezvous: Rendezvous) -> socket.socket:
    """On the first node: a socket that listens at the port. Errors: Unusable."""
    _check_host(rendezvous)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", rendezvous.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        return socket.create_server(("", rendezvous.port), backlog=512)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise Unusable(f"cannot listen at port {rendezvous.port} ({error.strerror})", "use another port") from None
    who = owner(rendezvous.port) or "a process of another user"
    raise Unusable(f"port {rendezvous.port} is taken by {who}", "end that process, or use another port")


def _check_host(rendezvous: Rendezvous) -> None:
    try:
        addresses = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unusable(
            f"host {rendezvous.host} is unknown ({error.strerror})", "give a name or address that all nodes know"
        ) from None
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as trial:
            try:
                trial.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
            return
    raise Unusable(
        f"{rendezvous.host} is not an address of the first node",
        "give the first node's name (MASTER_ADDR), or its address",
    )


def reach(rendezvous: Rendezvous, deadline: float) -> None:
    """Waits until a process listens there. Errors: Unusable at the deadline."""
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
                "read the first node's message; if there is none, check routes, host name and firewall",
            )
        time.sleep(PAUSE)


def owner(port: int) -> str:
    """The process that listens at a port, such as 'process 71 (python train.py)'; empty if it is not visible."""
    sockets = _listening(port)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {match[1] for fd in os.scandir(process / "fd") if (match := SOCKET.fullmatch(os.readlink(fd.path)))}
            if held & sockets:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                return f"process {process.name} ({command[:80]})"
        except OSError:  # it has ended, or belongs to another user
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
