"""A link is one life of one job of a run; this records them in RUN/links.jsonl and says how a run is to go on.

The batch script calls `python -m megatron_paint.launch.slurm.attempts begin RUN` before training and
`end RUN --status S` after it, with `--bad-nodes FILE` where the preflight may have named nodes. Both print one word and
a reason: `go` or `next` where the run is to go on, `done`, or `stop`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import read_config
from megatron_paint.config.schedule import due_after
from megatron_paint.run.folder import LINKS, STOPPED, RunFolder
from megatron_paint.runtime.files import append_line, disk_errors, write_atomically

Word = Literal["go", "done", "next", "stop"]
MISTAKE = 2  # exit status of a user's mistake, which no repetition mends
IDLE_LINKS = 2  # so many in a row without a newer checkpoint end the run


def record_launch(run: Path, *, steps: int) -> Callable[[], None]:
    """Notes a launch by the user, from which links are counted anew; an earlier stop no longer holds.

    Before the jobs are submitted, as one may begin at once. What it returns takes it back, for where none was.
    """
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        stopped = _read_stop(run)
        (run / STOPPED).unlink(missing_ok=True)
    before = _asked_steps(RunFolder(run).read_links())
    _record(run, {"event": "launch", "steps": steps})

    def take_back() -> None:
        if stopped is not None:
            write_atomically(run / STOPPED, f"{stopped}\n")
        _record(run, {"event": "launch", "steps": before})

    return take_back


def begin(run: Path, environ: Mapping[str, str]) -> tuple[Word, str]:
    """Records that a link begins, where it is to."""
    records = RunFolder(run).read_links()
    if (stopped := _read_stop(run)) is not None:
        return "stop", stopped
    if records and records[-1].get("decision") == "done":
        return "done", records[-1].get("reason", "")
    checkpoint = RunFolder(run).latest_checkpoint() or 0
    if (idle := idle_links(records, checkpoint)) >= IDLE_LINKS:
        return _stop(run, f"{idle} links in a row ended without a checkpoint newer than step {checkpoint}")
    _record(run, {"event": "begin", **_job(environ), "checkpoint": checkpoint})
    return "go", f"from step {checkpoint}"


def end(run: Path, status: int, environ: Mapping[str, str], *, bad_nodes: Sequence[str] = ()) -> tuple[Word, str]:
    """Records the end of a link and says what follows; training's exit status alone tells too little.

    torchrun has one status for every failure, and 0 for a run that a signal stopped as well. bad_nodes: those that the
    preflight named, which the next link stays off.
    """
    checkpoint = RunFolder(run).latest_checkpoint() or 0
    line = {"event": "end", **_job(environ), "checkpoint": checkpoint, "status": status}
    line |= {"bad_nodes": list(bad_nodes)} if bad_nodes else {}
    word, reason = _decide(run, line, [*RunFolder(run).read_links(), line])
    _record(run, {**line, "decision": word, "reason": reason})
    return (word, reason) if word != "stop" else _stop(run, reason)


def _decide(run: Path, ended: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> tuple[Word, str]:
    """What follows the link that `ended`, the last of the records."""
    status, checkpoint = ended["status"], ended["checkpoint"]
    if (steps := finished_steps(run, records)) is not None:
        return "done", f"all {steps} steps, with what was due after them"
    if (now := _newest_link(records)) != _newest_link([ended]):
        return "next", f"job {now[0]} has begun its life {now[1]} meanwhile, as where this one's node was cut off"
    if status == MISTAKE:
        return "stop", f"exit status {MISTAKE}: a mistake in the settings or the data, or a full disk; see the log"
    if new := new_bad_nodes(records):
        return "next", f"exit status {status}, step {checkpoint}: named for the first time: {', '.join(new)}"
    idle = idle_links(records, checkpoint)
    if idle >= IDLE_LINKS:
        return "stop", (
            f"{idle} links in a row ended without a checkpoint newer than step {checkpoint}, the last one with exit "
            f"status {status}"
        )
    what = "no newer checkpoint yet" if idle else "a newer checkpoint was written"
    return "next", f"exit status {status}, step {checkpoint}: {what}"


def finished_steps(run: Path, records: Sequence[Mapping[str, Any]]) -> int | None:
    """The steps of a run whose last one has its checkpoint and all else that is due after it; None before that."""
    folder = RunFolder(run)
    if not folder.config_file.exists():
        return None
    settings = settings_of(read_config(folder.config_file))
    steps = settings.run.steps
    if steps < _asked_steps(records):
        return None  # the settings of an earlier launch: this one's training has not begun
    due = [task for task in due_after(steps, settings.run) if task != "evaluation" or settings.evaluation.problems]
    return steps if all(folder.holds(task, steps) for task in due) else None


def _asked_steps(records: Sequence[Mapping[str, Any]]) -> int:
    """The steps that the last launch asked for; 0: there was none."""
    return next((record["steps"] for record in reversed(records) if record.get("event") == "launch"), 0)


def _newest_link(records: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Job and restart of the link that began last; of a lone record its own."""
    begun = [record for record in records if record.get("event") == "begin"] or records
    return begun[-1]["job"], begun[-1]["restart"]


def new_bad_nodes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the bad nodes in the last record, those that no link before it named since the launch."""
    known: set[str] = set()
    new: list[str] = []
    for record in records:
        if record.get("event") == "launch":
            known = set()
        named = record.get("bad_nodes", [])
        new = [node for node in named if node not in known]
        known.update(named)
    return new


def idle_links(records: Sequence[Mapping[str, Any]], checkpoint: int) -> int:
    """Links in a row, up to now, in which no newer checkpoint came; `checkpoint` is the newest one's step, 0: none.

    A link that never recorded its end, as where its node died, counts like any other: it ended before the next began.
    One that named a bad node for the first time does not: the next one stays off it, so that this comes to an end.
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
    """Leaves the reason in RUN/STOPPED, which keeps links that are still queued from beginning."""
    write_atomically(run / STOPPED, f"{reason}\n")
    return "stop", reason


def _read_stop(run: Path) -> str | None:
    """Why the run is stopped; None where it is not."""
    return (run / STOPPED).read_text(encoding="utf-8").strip() if (run / STOPPED).exists() else None


def _job(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "job": environ.get("SLURM_JOB_ID", ""),
        "restart": int(environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": environ.get("SLURM_JOB_NODELIST", ""),
    }


def _record(run: Path, record: Mapping[str, Any]) -> None:
    append_line(run / LINKS, to_json({**record, "time": datetime.now(UTC).isoformat(timespec="seconds")}))


def _read_names(file: Path | None) -> list[str]:
    return file.read_text(encoding="utf-8").split() if file is not None and file.is_file() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the word and the reason; exit status 2 where the folder cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m megatron_paint.launch.slurm.attempts", description=__doc__)
    actions = parser.add_subparsers(required=True, dest="action")
    for name in ("begin", "end"):
        action = actions.add_parser(name)
        action.add_argument("run", type=Path, metavar="RUN")
        if name == "end":
            action.add_argument("--status", type=int, required=True, help="exit status of training")
            action.add_argument("--bad-nodes", type=Path, metavar="FILE", help="nodes' names, if it is there")
    options = parser.parse_args(arguments)
    try:
        if options.action == "begin":
            word, reason = begin(options.run, os.environ)
        else:
            bad_nodes = _read_names(options.bad_nodes)
            word, reason = end(options.run, options.status, os.environ, bad_nodes=bad_nodes)
    except UserError as error:
        print(f"link: error: {error}", file=sys.stderr)
        return 2
    print(word, reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
