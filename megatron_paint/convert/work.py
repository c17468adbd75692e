"""Runs the tasks of a conversion in one or more processes. The output folder appears when it is complete.

A task writes its bytes and waits until they are on disk. Only then it writes its record. An interrupted conversion
resumes with the tasks that have no record. The plan beside the records shows whether they are of the same conversion.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from megatron_paint import __version__
from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.runtime.files import NewFolder, disk_errors, lock_of, sync, write_atomically
from megatron_paint.runtime.processes import start_worker

PLAN, RECORDS = "plan.json", "records"
CHECKPOINT_FILES = ("config.json", "adapter_config.json", ".metadata")  # --overwrite replaces folders with one of these
TASK_BYTES = 256 * 10**6
PROCESS_BYTES = 2 * 10**9  # one more process is started for each such amount; ours


@dataclass(frozen=True, kw_only=True)
class Task:
    """A part of the work."""

    number: int
    entries: tuple[int, ...]  # indices of the entries that it converts
    nbytes: int  # size of these entries


class Job(Protocol):
    """A conversion. It can be pickled, so each process can make a worker from it."""

    @property
    def sources(self) -> tuple[Path, ...]:
        """The folders that the conversion reads."""

    def plan(self) -> dict[str, Any]:
        """Returns the sources and options. Two conversions with equal plans are the same conversion."""

    def begin(self, folder: Path) -> None:
        """Creates the files that the tasks write into. It is called once, with an empty folder."""

    def tasks(self) -> Sequence[Task]:
        """Returns the tasks in the order of their numbers."""

    def worker(self, folder: Path) -> Callable[[Task], dict[str, Any]]:
        """Returns a function that does a task and returns its record. It is called once in each process."""

    def notes(self) -> Sequence[str]:
        """Returns what the user should know about the sources."""

    def finish(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        """Writes the description of the complete output after all tasks. Checks that no tensor is missing."""


def cut_tasks(sizes: Sequence[int]) -> list[Task]:
    """Groups neighbouring entries into tasks of about TASK_BYTES."""
    tasks: list[Task] = []
    entries: list[int] = []
    filled = 0
    for index, size in enumerate(sizes):
        entries.append(index)
        filled += size
        if filled >= TASK_BYTES or index == len(sizes) - 1:
            tasks.append(Task(number=len(tasks), entries=tuple(entries), nbytes=filled))
            entries, filled = [], 0
    return tasks


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Returns size and time of change of each file of a source. If one changes, it is another conversion."""
    try:
        stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); is it being moved or deleted?") from None
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def convert(
    job: Job, out: Path, *, processes: int, overwrite: bool, progress: Callable[[int], None] = lambda nbytes: None
) -> list[dict[str, Any]]:
    """Does the job and returns the records of the tasks. Afterwards `out` is complete or absent.

    progress: called with the bytes that an earlier attempt has done, and then with the bytes of each task. Raises
    UserError if `out` exists without `overwrite`, if writing fails, or if a source is damaged or changes.
    """
    out = Path(os.path.abspath(out))
    _check_apart(out, job.sources)
    new = NewFolder(out)
    with disk_errors(out), _locked(new.unfinished):
        new.recover()
        _check_absent(out, overwrite)
        job = replace(job)  # a copy without cached reads of its sources
        plan = job.plan()
        tasks = job.tasks()
        records = _begin_or_resume(job, plan, tasks, new.unfinished)
        progress(sum(task.nbytes for task in tasks if task.number in records))
        remaining = [task for task in tasks if task.number not in records]
        for task, record in _run(job, new.unfinished, remaining, processes):
            records[task.number] = record
            progress(task.nbytes)
        ordered = [records[task.number] for task in tasks]
        if job.plan() != plan:
            raise UserError(
                f"{job.sources[0]} changed while it was read; run the same command again when it is complete"
            )
        job.finish(new.unfinished, ordered)
        shutil.rmtree(new.unfinished / RECORDS)
        (new.unfinished / PLAN).unlink()
        _check_absent(out, overwrite)
        new.finish(mark=False)
    return ordered


def _check_absent(out: Path, overwrite: bool) -> None:
    """Raises UserError if `out` exists and must not be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out} is {'a link' if out.is_symlink() else 'a file'}; give another folder for the output")
    if not overwrite:
        raise UserError(f"{out} exists; remove it, give another folder, or add --overwrite")
    if any(out.iterdir()) and not any((out / name).exists() for name in CHECKPOINT_FILES):
        raise UserError(f"{out} has no checkpoint, so --overwrite does not remove it; give another folder")


def _check_apart(out: Path, sources: Sequence[Path]) -> None:
    """Raises UserError if the output and a source are the same folder or one contains the other."""
    resolved = out.resolve()
    for source in (path.resolve() for path in sources):
        if resolved == source or resolved in source.parents or source in resolved.parents:
            raise UserError(
                f"the output {out} and the source {source} are the same folder, or one contains the other; give "
                "another folder for the output"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second conversion out of the same folder. The lock ends with the process, even if it is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = lock_of(folder)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise BlockingIOError  # the other conversion has just ended and removed the file
        except BlockingIOError:
            raise UserError(f"another conversion is writing {folder}; wait for it or give another folder") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _begin_or_resume(
    job: Job, plan: Mapping[str, Any], tasks: Sequence[Task], folder: Path
) -> dict[int, dict[str, Any]]:
    """Returns the records of an interrupted conversion with the same plan. Without one it prepares a new folder."""
    plan = {**plan, "version": __version__, "tasks": [[task.number, task.entries, task.nbytes] for task in tasks]}
    plan = json.loads(json.dumps(plan))
    if _read_json(folder / PLAN) == plan:
        found = {task.number: _read_json(folder / RECORDS / f"{task.number}.json") for task in tasks}
        return {number: record for number, record in found.items() if _is_done(record, folder)}
    shutil.rmtree(folder, ignore_errors=True)
    (folder / RECORDS).mkdir(parents=True)
    job.begin(folder)
    write_atomically(folder / PLAN, json.dumps(plan))
    return {}


def _is_done(record: Any, folder: Path) -> bool:
    """Tells whether a record is complete and its files exist in full size."""
    if not isinstance(record, dict) or not isinstance(record.get("sizes"), dict):
        return False
    paths = {folder / name: size for name, size in record["sizes"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _run(job: Job, folder: Path, tasks: Sequence[Task], processes: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    if min(processes, len(tasks)) <= 1:
        work = job.worker(folder)
        for task in tasks:
            yield task, _do(work, folder, task)
        return
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)), get_context("spawn"), initializer=_start_worker, initargs=(job, folder)
    )
    try:
        running: dict[Future, Task] = {pool.submit(_work, task): task for task in tasks}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process of the conversion was killed, probably because memory ran out: use fewer --processes. The same "
            "command resumes the conversion"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: Job
_folder: Path


def _start_worker(job: Job, folder: Path) -> None:
    global _job, _folder
    start_worker()  # Ctrl-C reaches only the parent, and workers end with it
    _job, _folder = job, folder


@cache
def _worker() -> Callable[[Task], dict[str, Any]]:
    """Makes the worker with the first task, so its errors reach the parent as the result of that task."""
    return _job.worker(_folder)


def _work(task: Task) -> dict[str, Any]:
    return _do(_worker(), _folder, task)


def _do(work: Callable[[Task], dict[str, Any]], folder: Path, task: Task) -> dict[str, Any]:
    record = work(task)
    for name in record["files"]:
        sync(folder / name)
    sync(folder)
    record["nbytes"] = task.nbytes
    record["sizes"] = {name: (folder / name).stat().st_size for name in record["files"]}
    write_atomically(folder / RECORDS / f"{task.number}.json", json.dumps(record))
    return record


def merged(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Merges the dictionaries `name` of all records."""
    return {key: value for record in records for key, value in record[name].items()}


def check_names(done: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError unless exactly the wanted tensors are done. Records on disk may be damaged."""
    if done.keys() != wanted.keys():
        odd = sorted(done.keys() ^ wanted.keys())
        raise UserError(
            f"the records of the interrupted conversion are damaged: {count_text(len(odd), 'tensor')} "
            f"{agreeing(len(odd), 'is', 'are')} missing or surplus, such as {odd[0]}; remove the unfinished folder and "
            "start again"
        )


def processes_for(nbytes: int, asked: int | None) -> int:
    """Returns the number of processes: one for each core, at most 8, and fewer if there is too little work.

    nbytes: size of the work. asked: the user's number, which is used if it is given. Raises UserError if it is below 1.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--processes must be at least 1, got {asked}")
    return asked or max(1, min(8, len(os.sched_getaffinity(0)), nbytes // PROCESS_BYTES))
