"""A job of a test's cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.until import until

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster

WAIT_SECONDS = 180.0  # generous, as the machine may be busy; a small job takes a second or two
# States that a job does not leave automatically. After NODE_FAIL Slurm requeues a job.
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Job:
    """What squeue, scancel and scontrol know and do about one job."""

    cluster: "Cluster"
    id: int

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, ..."""
        return self._fields()["JobState"]

    def has_ended(self) -> bool:
        """Whether it has ended for good; False if the controller does not answer at once."""
        try:
            return self._fields(at_once=True)["JobState"] in FINAL
        except AssertionError:
            return False

    def restarts(self) -> int:
        return int(self._fields()["Restarts"])

    def reason(self) -> str:
        """Why it waits or has failed: Dependency, Resources, NonZeroExitCode, ..."""
        return self._fields()["Reason"]

    def exit_code(self) -> int:
        """Of the batch script."""
        return int(self._fields()["ExitCode"].split(":")[0])

    def nodes(self) -> list[str]:
        """The nodes it has or had; empty before its first start."""
        listed = self._fields()["NodeList"]
        return [] if listed == "(null)" else self._show("hostnames", listed).split()

    def wait(self, *states: str, restarts: int | None = None, seconds: float = WAIT_SECONDS) -> str:
        """Waits until the job has one of the states, and so many restarts if given; returns the state.

        A controller that does not answer is asked again. Errors: AssertionError at once if the job has ended in
        another state, and after so many seconds.
        """

        def reached() -> str | None:
            try:
                fields = self._fields(at_once=True)
            except AssertionError:
                return None
            state = fields["JobState"]
            if state in states and restarts in (None, int(fields["Restarts"])):
                return state
            assert state not in FINAL, f"wanted {states} with {restarts} restarts: {self.describe()}"
            return None

        return until(reached, seconds=seconds, otherwise=lambda: f"wanted {states}: {self.describe()}")

    def wait_output(self, text: str, *, seconds: float = WAIT_SECONDS) -> None:
        """Returns when the job has printed the text."""

        def printed() -> bool:
            if text in self.output():
                return True
            if self.state() not in FINAL:
                return False
            assert text in self.output(), f"{text!r} was not printed: {self.describe()}"
            return True

        until(printed, seconds=seconds, otherwise=lambda: f"{text!r} was not printed: {self.describe()}")

    def output(self) -> str:
        """What it has printed so far, stdout as the job names it."""
        file = Path(self._fields()["StdOut"])
        return file.read_text() if file.exists() else ""

    def signal(self, name: str) -> None:
        """Signals the batch script alone, at once: what --signal=B:NAME@SECONDS does up to a minute too early."""
        self.cluster.run(["scancel", "--batch", f"--signal={name}", str(self.id)])

    def requeue(self) -> None:
        self._control("requeue", str(self.id))

    def hold(self) -> None:
        """Keeps a job waiting until `release`."""
        self._control("hold", str(self.id))

    def release(self) -> None:
        self._control("release", str(self.id))

    def set_time_limit(self, minutes: int) -> None:
        self._control("update", f"JobId={self.id}", f"TimeLimit={minutes}")

    def cancel(self) -> None:
        self.cluster.run(["scancel", str(self.id)])

    def describe(self) -> str:
        """Everything that helps to find out why a job is not in the expected state."""
        shown = self.cluster.run(["scontrol", "show", "job", str(self.id)], check=False)
        try:
            printed = self.output()
        except AssertionError:
            printed = ""
        return f"{shown.stdout}{shown.stderr}\n-- printed\n{printed[-3000:]}\n{self.cluster.logs()}"

    def _fields(self, *, at_once: bool = False) -> dict[str, str]:
        """scontrol's NAME=VALUE pairs; a value with a space is cut there. at_once: the controller is asked once."""
        words = self._show("job", "--oneliner", str(self.id), at_once=at_once).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _show(self, *what: str, at_once: bool = False) -> str:
        command = ["scontrol", "show", *what]
        return self.cluster.run(command).stdout if at_once else self.cluster.query(command)

    def _control(self, *arguments: str) -> None:
        self.cluster.run(["scontrol", *arguments])
