"""The launcher's message about the end of a run: which rank failed first, and why."""

import signal
from collections.abc import Sequence

from megatron_paint.launch.failure_notes import FailureNote
from megatron_paint.runtime.stop import STOPPED

# A library calls abort() when it finds that another rank is gone. So a rank that aborts is rarely the cause.
LIKELY_CAUSES = {
    signal.SIGKILL: "most often the kernel's out-of-memory killer (see dmesg); to save memory, use fewer processes, "
    "or a smaller data.micro_batch_tokens or rollout.batch_size",
    signal.SIGTERM: "another process asked it to end",
    signal.SIGBUS: "most often /dev/shm or a disk is full",
    signal.SIGSEGV: "a library crashed: megatron-paint doctor shows which libraries do not fit this machine",
    signal.SIGILL: "a library was built for another processor: megatron-paint doctor lists the libraries",
    signal.SIGABRT: "a library gave up and printed the reason above",
}


def ended_by(number: signal.Signals, kept: str = "") -> tuple[str, int]:
    """Message and exit status after a signal to the launcher. kept: what remains of its work."""
    return f"megatron-paint: ended by {number.name}" + (f"; {kept}" if kept else ""), 128 + number


def reason(exits: Sequence[int | None], notes: Sequence[FailureNote]) -> tuple[str, int]:
    """Message and exit status of a run.

    exits: exit status of each rank as in subprocess: negative for a signal, None if it still ran. notes: the earliest
    first.
    """
    killed = {rank: -code for rank, code in enumerate(exits) if code is not None and code < 0}
    direct = {rank: number for rank, number in killed.items() if number != signal.SIGABRT}
    if direct:
        return _killed(direct), 1
    if notes:
        return notes[0].text, 2 if notes[0].mistake else 1
    if killed:
        return _killed(killed), 1
    if STOPPED in exits and set(exits) <= {0, STOPPED}:
        return "", STOPPED
    for rank, code in enumerate(exits):
        if code:
            return f"megatron-paint: error: rank {rank} ended with exit status {code}", 1
    return "", 0


def _killed(killed: dict[int, int]) -> str:
    rank, number = min(killed.items())
    known = number in set(signal.Signals)
    name = f"{signal.Signals(number).name} (signal {number})" if known else f"signal {number}"
    ranks = f"rank {rank}" if len(killed) == 1 else f"ranks {', '.join(map(str, sorted(killed)))}"
    likely = f": {LIKELY_CAUSES[number]}" if number in LIKELY_CAUSES else ""
    return f"megatron-paint: error: {ranks} died of {name}{likely}"
