"""Records the attempts of a run in RUN/attempts.jsonl and decides how the run continues.

An attempt is one start of one Slurm job of the run. A requeued job starts a new attempt. The batch script calls
`python -m megatron_paint.launch.slurm.attempts begin RUN` before training and `end RUN --status S` after it. If the
preflight may have named nodes, it adds `--bad-nodes FILE`. Both commands print one word and a reason. The words are
`go` (train), `next` (the run continues with another attempt), `done`, and `stop`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import read_config
from megatron_paint.config.schedule import due_after
from megatron_paint.run.folder import ATTEMPTS, STOPPED, RunFolder
from megatron_paint.runtime.files import append_line, disk_errors, write_atomically

Word = Literal["go", "done", "next", "stop"]
MISTAKE = 2  # exit status of a user's mistake, which a repetition cannot correct
MAX_IDLE_ATTEMPTS = 2  # so many in a row without a newer checkpoint stop the run


def record_launch(run: Path, *, steps: int) -> Callable[[], None]:
    """Records a launch by the user. It removes an earlier stop, and attempts are counted again from here.

    Call it before the jobs are submitted, because a job may start at once. It returns a function that undoes it, for
    the case that no job was submitted.
    """
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        stopped = _read_stop(run)
        (run / STOPPED).unlink(missing_ok=True)
    before = _requested_steps(RunFolder(run).read_attempts())
    _record(run, {"event": "launch", "steps": steps})

    def undo() -> None:
        if stopped is not None:
            write_atomically(run / STOPPED, f"{stopped}\n")
        _record(run, {"event": "launch", "steps": before})

    return undo


def begin(run: Path, environ: Mapping[str, str]) -> tuple[Word, str]:
    """Records that an attempt begins, unless the run is done or stopped."""
    records = RunFolder(run).read_attempts()
    if (stopped := _read_stop(run)) is not None:
        return "stop", stopped
    if records and records[-1].get("decision") == "done":
        return "done", records[-1].get("reason", "")
    checkpoint = RunFolder(run).latest_checkpoint() or 0
    if (idle := idle_attempts(records, checkpoint)) >= MAX_IDLE_ATTEMPTS:
        return _stop(run, f"{idle} attempts in a row ended without a checkpoint newer than step {checkpoint}")
    _record(run, {"event": "begin", **_job(environ), "checkpoint": checkpoint})
    return "go", f"from step {checkpoint}"


def end(run: Path, status: int, environ: Mapping[str, str], *, bad_nodes: Sequence[str] = ()) -> tuple[Word, str]:
    """Records the end of an attempt and decides what follows.

    The exit status of training is not enough for the decision: torchrun returns the same status for every failure, and
    0 also for a run that a signal stopped. bad_nodes: the nodes that the preflight named; the next attempt avoids them.
    """
    checkpoint = RunFolder(run).latest_checkpoint() or 0
    line = {"event": "end", **_job(environ), "checkpoint": checkpoint, "status": status}
    line |= {"bad_nodes": list(bad_nodes)} if bad_nodes else {}
    word, reason = _decide(run, line, [*RunFolder(run).read_attempts(), line])
    _record(run, {**line, "decision": word, "reason": reason})
    return (word, reason) if word != "stop" else _stop(run, reason)


def _decide(run: Path, ended: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> tuple[Word, str]:
    """What follows the attempt that `ended`, the last of the records."""
    status, checkpoint = ended["status"], ended["checkpoint"]
    if (steps := finished_steps(run, records)) is not None:
        return "done", f"all {count_text(steps, 'step')}, and everything that was due after them"
    if (now := _newest_attempt(records)) != _newest_attempt([ended]):
        return "next", f"restart {now[1]} of job {now[0]} began in the meantime, perhaps because this node was cut off"
    if status == MISTAKE:
        return "stop", f"exit status {MISTAKE}: a mistake in the settings or the data, or a full disk; see the log"
    if new := new_bad_nodes(records):
        return "next", f"exit status {status}, step {checkpoint}: newly named bad nodes: {', '.join(new)}"
    idle = idle_attempts(records, checkpoint)
    if idle >= MAX_IDLE_ATTEMPTS:
        return "stop", (
            f"{idle} attempts in a row ended without a checkpoint newer than step {checkpoint}, the last one with exit "
            f"status {status}"
        )
    what = "no newer checkpoint yet" if idle else "a newer checkpoint was written"
    return "next", f"exit status {status}, step {checkpoint}: {what}"


def finished_steps(run: Path, records: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of steps if the last checkpoint and all tasks that are due after it are complete, else None."""
    folder = RunFolder(run)
    if not folder.config_file.exists():
        return None
    settings = settings_of(read_config(folder.config_file))
    steps = settings.run.steps
    if steps < _requested_steps(records):
        return None  # the settings are of an earlier launch: training of this launch has not started
    due = [task for task in due_after(steps, settings.run) if task != "evaluation" or settings.evaluation.problems]
    return steps if all(folder.holds(task, steps) for task in due) else None


def _requested_steps(records: Sequence[Mapping[str, Any]]) -> int:
    """The number of steps that the last launch requested; 0 without a launch."""
    return next((record["steps"] for record in reversed(records) if record.get("event") == "launch"), 0)


def _newest_attempt(records: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Job and restart of the attempt that began last. Without a record of a beginning: those of the last record."""
    begun = [record for record in records if record.get("event") == "begin"] or records
    return begun[-1]["job"], begun[-1]["restart"]


def new_bad_nodes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The bad nodes in the last record that no earlier attempt since the launch named."""
    known: set[str] = set()
    new: list[str] = []
    for record in records:
        if record.get("event") == "launch":
            known = set()
        named = record.get("bad_nodes", [])
        new = [node for node in named if node not in known]
        known.update(named)
    return new


def idle_attempts(records: Sequence[Mapping[str, Any]], checkpoint: int) -> int:
    """The number of latest attempts in a row without a newer checkpoint.

    checkpoint: step of the newest checkpoint; 0: none. An attempt that never recorded its end, for example because its
    node died, counts like any other one. An attempt that named a new bad node does not count: the next attempt avoids
    that node, so this cannot repeat forever.
    """
    steps: list[int] = []
    for number, record in enumerate(records):
        if record.get("event") == "launch":
            steps = []
        elif record.get("event") == "begin":
            steps.append(record["checkpoint"])
        elif steps and new_bad_nodes(records[: number + 1]):
            steps.pop()
    idle = 0
    for earlier, later in reversed(list(pairwise([*steps, checkpoint]))):
        if later > earlier:
            break
        idle += 1
    return idle


def _stop(run: Path, reason: str) -> tuple[Word, str]:
    """Writes the reason to RUN/STOPPED. Jobs that are still queued then do not train."""
    write_atomically(run / STOPPED, f"{reason}\n")
    return "stop", reason


def _read_stop(run: Path) -> str | None:
    """Why the run is stopped; None if it is not."""
    return (run / STOPPED).read_text(encoding="utf-8").strip() if (run / STOPPED).exists() else None


def _job(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "job": environ.get("SLURM_JOB_ID", ""),
        "restart": int(environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": environ.get("SLURM_JOB_NODELIST", ""),
    }


def _record(run: Path, record: Mapping[str, Any]) -> None:
    append_line(run / ATTEMPTS, to_json({**record, "time": datetime.now(UTC).isoformat(timespec="seconds")}))


def _read_names(file: Path | None) -> list[str]:
    return file.read_text(encoding="utf-8").split() if file is not None and file.is_file() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the word and the reason. The exit status is 2 if the folder cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m megatron_paint.launch.slurm.attempts", description=__doc__)
    actions = parser.add_subparsers(required=True, dest="action")
    for name in ("begin", "end"):
        action = actions.add_parser(name)
        action.add_argument("run", type=Path, metavar="RUN")
        if name == "end":
            action.add_argument("--status", type=int, required=True, help="exit status of training")
            action.add_argument(
                "--bad-nodes", type=Path, metavar="FILE", help="file with names of nodes; it may be missing"
            )
    options = parser.parse_args(arguments)
    try:
        if options.action == "begin":
            word, reason = begin(options.run, os.environ)
        else:
            bad_nodes = _read_names(options.bad_nodes)
            word, reason = end(options.run, options.status, os.environ, bad_nodes=bad_nodes)
    except UserError as error:
        print(f"attempt: error: {error}", file=sys.stderr)
        return 2
    print(word, reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
