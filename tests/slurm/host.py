"""A machine for a test: the kernel's namespaces around a process 1, with which all that runs in them dies."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

# The first line reads the /proc outside, so that it learns the number by which the outside knows this process.
# Mounts stay inside: unshare makes the new namespace's private. A shell that waits buries orphans, as process 1 has to.
BOOT = """
set -e
read -r pid _ < /proc/self/stat
hostname "$1"
mount -t proc proc /proc
mount --bind "$2" /etc/hosts
mount -t tmpfs -o mode=1777 shm /dev/shm
ip link set lo up
echo "$pid"
exec > /dev/null
set +e
sleep infinity &
wait
"""
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
# The kernel kills `unshare` with the test run, and process 1 with `unshare`: nothing is left of a killed test run.
UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child=KILL")


class Host:
    """A machine with its own hostname, network, process numbers, mounts and /dev/shm; all machines share the files."""

    def __init__(self, name: str, *, hosts: Path, log: Path) -> None:
        """Boots it, without a network cable. hosts: its /etc/hosts; log: takes what its daemons print."""
        self.name = name
        self._log = log
        self._daemons: dict[str, subprocess.Popen] = {}
        command = [*UNSHARE, "bash", "-c", BOOT, "boot", name, str(hosts)]
        with log.open("a") as out:
            self._unshare = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C is for the test run alone, which then ends its hosts
            )
        with self._unshare.stdout as booted:
            first = booted.readline().strip()
        if not first:
            self._unshare.wait()
            raise RuntimeError(f"the machine {name} did not boot: {log.read_text().strip()}")
        self.pid = int(first)

    def enter(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on this machine."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *argv]

    def connect(self, cable: str, address: str, switch: "Host") -> None:
        """Lays a cable to a bridge called `br0` on another machine; `cable` is the name of its end there."""
        # The same hardware address after a crash: others send to the one that they know.
        card = "02:00:00:00:00:" + format(int(address.split("/")[0].rsplit(".", 1)[1]), "02x")
        lay = ["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "address", card]
        lay += ["netns", str(self.pid)]
        # With the outside's process numbers, by which ip finds the namespace of the other end.
        _run(["nsenter", f"--target={switch.pid}", "--net", "--", *lay])
        _run(switch.enter(["ip", "link", "set", cable, "master", "br0", "up"]))
        _run(self.enter(["ip", "address", "add", address, "dev", "eth0"]))
        _run(self.enter(["ip", "link", "set", "eth0", "up"]))

    def start_daemon(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        """Starts a program that stays in the foreground until it is stopped."""
        # On a busy machine a daemon must still answer within a second or two, or its node is taken for dead.
        with self._log.open("a") as out:
            self._daemons[argv[0]] = subprocess.Popen(
                self.enter(["nice", "-n", "-10", *argv]),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def daemon_ended(self, name: str) -> bool:
        return name not in self._daemons or self._daemons[name].poll() is not None

    def kill(self) -> None:
        """The machine loses its power; when this returns, no process of it is left."""
        os.kill(self.pid, signal.SIGKILL)
        for process in (self._unshare, *self._daemons.values()):
            process.wait()


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}"
