"""The run folder: its layout, how a run starts in it, and how it resumes.

config.yaml, metrics.jsonl, samples/step_000001.jsonl, eval/step_000100.json, checkpoints/step_000025/, hf/step_000100/,
logs/; on Slurm attempts.jsonl; with run.profile profile/. Only one process, rank 0, writes, except traces in profile/;
any process may read.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError, about
from megatron_paint.base.json_text import to_json
from megatron_paint.config.allow_changes import may_be_allowed
from megatron_paint.config.saved import (
    allowed_changes,
    forbidden_changes,
    moved_decay_end,
    read_config,
    to_yaml,
)
from megatron_paint.config.schedule import Task
from megatron_paint.config.secrets import recorded_tree, without_secrets
from megatron_paint.records import EvalReport
from megatron_paint.run.lock_watch import LOCK
from megatron_paint.runtime.files import (
    COMPLETE,
    NewFolder,
    append_line,
    clear_left_overs,
    disk_errors,
    is_left_over,
    write_atomically,
)
from megatron_paint.runtime.heartbeat import clear_heartbeats
from megatron_paint.runtime.new_folders import check_writable

STEP_NAME = re.compile(r"step_(\d{6,})")
ATTEMPTS = "attempts.jsonl"  # a line for each begin and end of a Slurm job of the run
CHANGES = "changes.jsonl"  # a line for each setting that run.allow_changes let a resumed run change
STOPPED = "STOPPED"  # why no further job of the run is to start
# The batch system and its jobs write there before the run starts, and a run takes its lock before anything else.
ALLOWED_BEFORE = {"logs", ATTEMPTS, STOPPED, LOCK}


class RunFolder:
    """Paths, writing and reading of one run folder. Creating the object changes nothing on the disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.logs = self.path / "logs"
        self.heartbeats = self.logs / "heartbeats"
        self.profile = self.path / "profile"
        self.timeline_file = self.profile / "timeline.json"

    # Starting

    def prepare(self, settings: Any) -> int:
        """Creates the folder, or prepares it for resuming, as `run.resume` asks. Returns the last step done, 0: none.

        settings: the Settings, or the same as nested dictionaries. config.yaml is written first: a folder that cannot
        be written is found before any work. A resumed run removes metrics, samples and evaluations of steps after its
        checkpoint. Exports stay until they are due again. UserError: the folder is not empty and run.resume=never;
        there is no checkpoint and run.resume=required; a setting changed that must not change; the disk refuses.
        """
        step = self.check(settings)
        changed = self.allowed_changes(settings)
        with about("run.dir"), disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for name, (old, new) in changed.items():
                now = datetime.now(UTC).isoformat(timespec="seconds")
                change = {"after_step": step, "setting": name, "old": old, "new": new, "time": now}
                append_line(self.path / CHANGES, to_json(change))
            write_atomically(self.config_file, to_yaml(recorded_tree(settings)))
            for folder in (self.path / "samples", self.path / "eval", self.path / "checkpoints", self.logs):
                folder.mkdir(exist_ok=True)
        self._take_back(step)
        return step

    def check(self, settings: Any) -> int:
        """What `prepare` would return or raise. It leaves nothing behind."""
        new = recorded_tree(settings)
        resume = new["run"]["resume"]
        held = self._held()
        if resume == "never" and held:
            raise UserError(
                f"run.dir={self.path} is not empty: it contains {', '.join(held[:3])}. Give another run.dir, or resume "
                "the run in it with run.resume=auto"
            )
        step = (self.latest_checkpoint() or 0) if resume != "never" else 0
        if resume == "required" and step == 0:
            raise UserError(
                f"run.dir={self.path} has no complete checkpoint to resume from, but run.resume=required. "
                "Give the run.dir of an earlier run, or start with run.resume=auto"
            )
        if held:
            self._check_unchanged(new)
        if step > new["run"]["steps"]:
            raise UserError(
                f"run.steps={new['run']['steps']} is before step {step}, the newest checkpoint of "
                f"run.dir={self.path}: set run.steps to {step} or more"
            )
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            raise UserError(
                f"run.dir={self.path} cannot be written: {existing} is read-only or not yours to write; give another"
            )
        with about("run.dir"):  # only an attempt shows what else may be wrong
            check_writable(self.path)
        return step

    def allowed_changes(self, settings: Any) -> dict[str, tuple[Any, Any]]:
        """What a start with these settings changes because run.allow_changes names it: key -> (old, new)."""
        if not self.config_file.exists():
            return {}
        return allowed_changes(old=self._read_config(), new=recorded_tree(settings))

    def _read_config(self) -> dict[str, Any]:
        """config.yaml without secrets, which earlier versions have written."""
        return without_secrets(read_config(self.config_file))

    def _held(self) -> list[str]:
        with about("run.dir"), disk_errors(self.path):
            if not self.path.exists():
                return []
            names = [entry.name for entry in self.path.iterdir() if not is_left_over(entry.name)]
            return sorted(name for name in names if name not in ALLOWED_BEFORE and not name.startswith(f".{LOCK}."))

    def _check_unchanged(self, new: Mapping[str, Any]) -> None:
        if not self.config_file.exists():
            raise UserError(
                f"run.dir={self.path} is neither empty nor a run folder: it has no config.yaml. Give another run.dir"
            )
        old = self._read_config()
        if changed := forbidden_changes(old=old, new=new):
            raise UserError(
                f"run.dir={self.path} was started with other settings: {'; '.join(changed)}. "
                f"{_ways_out([change.partition(':')[0] for change in changed], new['run'].get('allow_changes', ()))}"
            )
        if moved := moved_decay_end(old=old, new=new):
            raise UserError(f"{moved}; or start again in another run.dir than {self.path}")

    def _take_back(self, step: int) -> None:
        for folder in (self.path, *(self.path / kind for kind in ("samples", "eval", "checkpoints", "hf", "profile"))):
            clear_left_overs(folder)
        clear_heartbeats(self.heartbeats)
        kept = [line for line, at in self._metric_lines() if at <= step]
        write_atomically(self.metrics_file, "".join(line + "\n" for line in kept))
        with disk_errors(self.path):
            for kind, ending in (("samples", ".jsonl"), ("eval", ".json")):
                for at, file in _steps(self.path / kind, ending):
                    if at > step:
                        file.unlink()

    # Metrics, samples and evaluations

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Appends the line of one step, which has the key `step`. Numbers that are not finite become null."""
        append_line(self.metrics_file, to_json(dict(metrics)))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl. A line that a crash cut short is skipped."""
        return [json.loads(line) for line, _ in self._metric_lines()]

    def _metric_lines(self) -> list[tuple[str, int]]:
        if not self.metrics_file.exists():
            return []
        lines = []
        for line in self.metrics_file.read_bytes().decode("utf-8", "replace").split("\n"):
            try:
                step = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # cut short by a crash, or the empty end
            if type(step) is int:
                lines.append((line, step))
        return lines

    def samples_file(self, step: int) -> Path:
        """The file of the samples of one step."""
        return self.path / "samples" / f"{step_name(step)}.jsonl"

    def write_samples(self, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes all samples of one step at once, one line per sample."""
        write_atomically(self.samples_file(step), "".join(to_json(dict(line)) + "\n" for line in lines))

    def read_samples(self, step: int) -> list[dict[str, Any]]:
        """The samples of one step. UserError: there are none, and it names the steps that exist; a line is damaged."""
        samples = []
        for number, line in enumerate(self.sample_lines(step), 1):
            try:
                samples.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.samples_file(step)}: line {number} is damaged ({error})") from error
        return samples

    def sample_lines(self, step: int) -> list[str]:
        """The lines of the samples of one step, damaged or not. UserError: there are none; it names the steps that
        exist."""
        file = self.samples_file(step)
        if not file.exists():
            there = [at for at, _ in _steps(self.path / "samples", ".jsonl")]
            steps = f"it has steps {there[0]} to {there[-1]}" if there else "it has no samples"
            raise UserError(f"{self.path} has no samples of step {step}: {steps}. Give one of these steps")
        return [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line]

    def write_eval(self, report: EvalReport) -> None:
        """Writes one evaluation. It replaces an earlier one of the same step."""
        file = self.path / "eval" / f"{step_name(report.step)}.json"
        write_atomically(file, to_json(dataclasses.asdict(report), indent=1) + "\n")

    def read_eval(self, step: int) -> EvalReport:
        """The evaluation of one step. UserError: it does not exist, or it cannot be read."""
        from megatron_paint.evaluation.summary import read_report  # numpy, which other callers need not import

        file = self.path / "eval" / f"{step_name(step)}.json"
        try:
            return read_report(file)
        except UserError as error:
            there = ", ".join(str(at) for at in self.evaluated_steps()) or "none"
            raise UserError(f"{error}; steps evaluated: {there}") from error

    def evaluated_steps(self) -> list[int]:
        """Steps that have an evaluation, in ascending order."""
        return [at for at, _ in _steps(self.path / "eval", ".json")]

    def trace_file(self, step: int, rank: int) -> Path:
        """The trace of one step on one rank, where `run.profile` asks for it."""
        return self.profile / f"{step_name(step)}_rank_{rank:04d}.trace.json.gz"

    def remove_traces(self, step: int) -> None:
        """Removes the traces of one step, complete or not. They are of an earlier attempt, maybe one of more ranks."""
        with disk_errors(self.profile):
            for name in (step_name(step), f".{step_name(step)}"):
                for file in self.profile.glob(f"{name}_rank_*.trace.json*"):
                    file.unlink(missing_ok=True)

    # Checkpoints and exports

    def checkpoint_folder(self, step: int) -> Path:
        """The folder of the checkpoint of one step, complete or not."""
        return self.path / "checkpoints" / step_name(step)

    def checkpoints(self) -> list[int]:
        """Steps that have a complete checkpoint, in ascending order."""
        return [at for at, folder in _steps(self.path / "checkpoints", "") if (folder / COMPLETE).is_file()]

    def latest_checkpoint(self) -> int | None:
        """The newest step that has a complete checkpoint."""
        return max(self.checkpoints(), default=None)

    def kept_text(self) -> str:
        """What remains of the run if it ends now, and how it resumes."""
        newest = self.latest_checkpoint()
        if newest is None:
            return f"{self.path} has no checkpoint yet, so {self.again()} begins it again"
        return f"{self.checkpoint_folder(newest)} is kept, and {self.again()} resumes from it"

    def again(self) -> str:
        """The command that continues the run, in words. It needs run.resume=auto, unless the run has a value for it."""
        try:
            resumes = read_config(self.config_file)["run"]["resume"] != "never"
        except (UserError, KeyError, TypeError):
            resumes = False
        return "the same command" if resumes else "the same command with run.resume=auto"

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it no longer counts as one; returns the new path."""
        folder = self.checkpoint_folder(step)
        with disk_errors(folder):
            number = next(n for n in itertools.count(1) if not folder.with_name(f"damaged_{n}_{folder.name}").exists())
            return folder.rename(folder.with_name(f"damaged_{number}_{folder.name}"))

    def remove_checkpoints(self, steps: Iterable[int]) -> None:
        """Removes checkpoints. Each is renamed to unfinished first, so that after a crash the next start removes it."""
        for step in steps:
            unfinished = NewFolder(self.checkpoint_folder(step)).unfinished
            with disk_errors(unfinished):
                self.checkpoint_folder(step).rename(unfinished)
            shutil.rmtree(unfinished, ignore_errors=True)

    def hf_folder(self, step: int) -> Path:
        """The folder of the export of one step."""
        return self.path / "hf" / step_name(step)

    def holds(self, task: Task, step: int) -> bool:
        """Whether the result of a task that is due after a step exists and is complete."""
        if task == "checkpoint":
            return step in self.checkpoints()
        return self.hf_folder(step).is_dir() if task == "export" else step in self.evaluated_steps()

    # Jobs

    def read_attempts(self) -> list[dict[str, Any]]:
        """All complete lines of attempts.jsonl; a line that a crash cut short is left out."""
        file = self.path / ATTEMPTS
        records = []
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records


def _ways_out(changed: Sequence[str], allowed: Sequence[str]) -> str:
    """What a user can do about changed settings. run.allow_changes is offered only for those that it can name.

    allowed: what run.allow_changes names already.
    """
    again = "Restore them to resume, or start again in another run.dir"
    fixed = [name for name in changed if not may_be_allowed(name)]
    free = [name for name in changed if name not in fixed]
    if not free:
        return again
    option = f"run.allow_changes=[{','.join([*allowed, *free])}]"  # no space: it can be pasted into a shell
    if not fixed:
        return f"{again}, or change them on purpose with {option}"
    others = "the other" if len(free) == 1 else "the others"
    return f"{again}. {', '.join(fixed)} cannot change when a run resumes; {option} allows {others}"


def step_name(step: int) -> str:
    """The name of a step's file or folder, without the ending."""
    return f"step_{step:06d}"


def _steps(folder: Path, ending: str) -> list[tuple[int, Path]]:
    """Entries that are named after a step, in ascending order."""
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        match = STEP_NAME.fullmatch(entry.name.removesuffix(ending)) if entry.name.endswith(ending) else None
        if match:
            found.append((int(match[1]), entry))
    return sorted(found)
