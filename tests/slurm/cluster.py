"""A real Slurm cluster on this machine: slurmctld on a login host and one slurmd per node, each host in namespaces.

    with Cluster(nodes=4, gpus=8, cpus=96) as cluster:
        job = cluster.submit("#!/bin/bash\\nsrun hostname", "--nodes=2")
        job.wait("COMPLETED")
        assert job.output().split() == ["n1", "n2"]
        cluster.crash("n2")

Every host has its own address, hostname, process numbers and /dev/shm; files are shared, as on a cluster's file system.
GPUs, CPUs and memory are claims that Slurm hands out like real ones. All files lie in one temporary folder.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.slurm.configuration import LOGIN, address, write_configuration
from tests.slurm.folders import OwnedFolder
from tests.slurm.host import Host
from tests.slurm.job import Job
from tests.slurm.requirements import PATH
from tests.support.until import until

START_SECONDS = 120.0  # of a daemon on a busy machine; a second on a quiet one
COMMAND_SECONDS = 60.0
QUERY_SECONDS = 60.0
SLOW = ("Socket timed out", "Unable to contact slurm controller")  # of a controller on a busy machine
# Variables of a surrounding job, or of a rank environment: a job here must not inherit them.
FOREIGN = re.compile("S(LURM|BATCH|ALLOC|RUN)_|(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")


class Cluster:
    """Nodes n1, n2, ... and the host `login`; a context manager. Errors: RuntimeError, AssertionError."""

    def __init__(self, *, nodes: int = 4, gpus: int = 8, cpus: int = 96, memory_mb: int = 2_000_000) -> None:
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._hardware = {"gpus": gpus, "cpus": cpus, "memory_mb": memory_mb}
        self._hosts: dict[str, Host] = {}
        self._cut: set[str] = set()
        self._kept: set[int] = set()

    def __enter__(self) -> "Cluster":
        self._owned = OwnedFolder()
        self.folder = self._owned.path
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._hosts):
            self._hosts.pop(name).kill()
        self._owned.remove()

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        on: str = LOGIN,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: str = "",
        check: bool = True,
        seconds: float = COMMAND_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host. env: added to the environment. seconds: then the command is killed."""
        # `timeout` ends what the command has started as well, which would hold the pipes open otherwise.
        limited = ["env", f"--chdir={cwd or self.folder / 'jobs'}", "timeout", "--kill-after=5", str(seconds)]
        command = self._hosts[on].enter([*limited, *map(str, argv)])
        environment = self._environment() | (env or {})
        done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def query(self, argv: Sequence[str | Path]) -> str:
        """What a command that may be repeated prints; a controller that does not answer is asked again for a while."""
        answers: list[subprocess.CompletedProcess[str]] = []

        def answered() -> bool:
            answers.append(self.run(argv, check=False))
            return answers[-1].returncode == 0 or not any(text in answers[-1].stderr for text in SLOW)

        until(answered, seconds=QUERY_SECONDS, otherwise=lambda: f"{argv}: {answers[-1].stderr}")
        assert answers[-1].returncode == 0, f"{argv}: {answers[-1].stdout}{answers[-1].stderr}"
        return answers[-1].stdout

    def start_program(self, argv: Sequence[str | Path], *, on: str) -> subprocess.Popen[str]:
        """Starts a command on a host; a context manager, at whose end the command's stdin ends and it is waited for."""
        command = self._hosts[on].enter([*map(str, argv)])
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._environment(), stdin=pipe, stdout=pipe, text=True)

    def submit(
        self,
        script: str | Path,
        *sbatch_args: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Job:
        """Gives a batch script, or the file that holds it, to sbatch."""
        file, stdin = ([script], "") if isinstance(script, Path) else ([], script)
        done = self.run(["sbatch", "--parsable", *sbatch_args, *file], env=env, cwd=cwd, stdin=stdin)
        return Job(self, int(done.stdout.split(";")[0]))

    def nodes(self) -> dict[str, str]:
        """State of each node in sinfo's words: idle, mixed, allocated, down, ...; with a * where it does not answer."""
        lines = self.query(["sinfo", "--noheader", "--Node", "--format=%N %T"]).splitlines()
        return dict(line.split() for line in lines)

    def wait_nodes(self, state: str, *names: str, seconds: float = START_SECONDS) -> None:
        """Returns when the named nodes, or all, have the state."""
        wanted = names or self.names

        def reached() -> bool:
            return all(found.get(name) == state for name in wanted) if (found := self._known_nodes()) else False

        until(
            reached, seconds=seconds, otherwise=lambda: f"wanted {wanted} {state}: {self._known_nodes()}\n{self.logs()}"
        )

    def crash(self, node: str) -> None:
        """The node loses its power, and all its processes die."""
        self._hosts.pop(node).kill()

    def start(self, node: str) -> None:
        """Boots a node."""
        until(
            lambda: self.run(["ip", "link", "show", node], check=False).returncode,
            seconds=START_SECONDS,
            otherwise=lambda: f"the cable of the crashed {node} is still there",
        )
        host = self._boot(node)
        host.connect(node, f"{address(node)}/24", self._hosts[LOGIN])
        host.start_daemon(["slurmd", "-D", "-N", node], self._environment())

    def cut(self, node: str) -> None:
        """Cuts the node off the network; its processes continue."""
        self._set_cable(node, "down")
        self._cut.add(node)

    def mend(self, node: str) -> None:
        """Reconnects it to the network; Slurm notices it after about 20 s."""
        self._set_cable(node, "up")
        self._cut.discard(node)

    def start_controller(self) -> None:
        """Starts slurmctld and returns when it answers."""
        login = self._hosts[LOGIN]
        login.start_daemon(["slurmctld", "-D"], self._environment())

        def answers() -> bool:
            if login.daemon_ended("slurmctld"):
                raise RuntimeError(f"slurmctld ended:\n{self.logs()}")
            return "is UP" in self.run(["scontrol", "ping"], check=False).stdout

        until(answers, seconds=START_SECONDS, otherwise=lambda: f"slurmctld does not answer:\n{self.logs()}")

    def stop_controller(self) -> None:
        """Makes slurmctld save its state and end; jobs continue."""
        self.run(["kill", "-TERM", (self.folder / "slurmctld.pid").read_text().strip()])
        until(
            lambda: self._hosts[LOGIN].daemon_ended("slurmctld"),
            seconds=START_SECONDS,
            otherwise=lambda: f"slurmctld did not end:\n{self.logs()}",
        )

    def keep(self, job: Job) -> None:
        """Makes `repair` ignore a job."""
        self._kept.add(job.id)

    def repair(self) -> None:
        """Ends all jobs and restores everything that a test took down."""
        if self._hosts[LOGIN].daemon_ended("slurmctld"):
            self.start_controller()
        if left := self._active_jobs():
            self.query(["scancel", *left])
        for node in list(self._cut):
            self.mend(node)
        for node in self.names:
            if node not in self._hosts:
                self.start(node)

        def repaired() -> bool:
            nodes = self._known_nodes()
            return bool(nodes) and set(nodes.values()) <= {"idle", "mixed", "allocated"} and not self._active_jobs()

        until(
            repaired,
            seconds=START_SECONDS,
            otherwise=lambda: f"jobs {self._active_jobs()} on {self._known_nodes()}\n{self.logs()}",
        )

    def logs(self, lines: int = 15) -> str:
        """The ends of all daemons' logs, without their complaint of an MPI library that nothing here needs."""
        text = ""
        for file in sorted((self.folder / "log").iterdir()):
            lines_of_log = [line for line in file.read_text().splitlines() if "mpi/pmi" not in line]
            # The log of a daemon also contains what it prints, except the reason if it could not open its log.
            text += "\n".join([f"-- {file.name}", *lines_of_log[-lines if file.suffix == ".log" else -3 :], ""])
        return text

    def _start(self) -> None:
        write_configuration(self.folder, self.names, **self._hardware)
        login = self._boot(LOGIN)
        self.run(["ip", "link", "add", "br0", "type", "bridge"])
        self.run(["ip", "address", "add", f"{address(LOGIN)}/24", "dev", "br0"])
        self.run(["ip", "link", "set", "br0", "up"])
        login.start_daemon(self._munged(), self._environment())
        until(
            lambda: (self.folder / "munge.socket").exists(),
            seconds=START_SECONDS,
            otherwise=lambda: f"munged made no socket:\n{self.logs()}",
        )
        self.start_controller()
        for node in self.names:
            self.start(node)
        self.wait_nodes("idle")

    def _munged(self) -> list[str]:
        """One daemon serves every host, as a Unix socket is reached through the shared files."""
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        named = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        return ["munged", "--foreground", "--force", *named]

    def _boot(self, name: str) -> Host:
        if name in self._hosts:
            raise RuntimeError(f"{name} is running")
        host = Host(name, hosts=self.folder / "hosts", log=self.folder / f"log/{name}.out")
        self._hosts[name] = host
        return host

    def _set_cable(self, node: str, state: str) -> None:
        self.run(["ip", "link", "set", node, state])

    def _active_jobs(self) -> list[str]:
        """Jobs that wait or run and are not kept."""
        jobs = self.query(["squeue", "--noheader", "--format=%A"]).split()
        return [job for job in jobs if int(job) not in self._kept]

    def _known_nodes(self) -> dict[str, str]:
        """As `nodes`, and empty while the controller does not answer."""
        try:
            return self.nodes()
        except AssertionError:
            return {}

    def _environment(self) -> dict[str, str]:
        plain = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        return plain | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}
