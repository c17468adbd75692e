"""Runs a conversion's tasks in one or more processes, into a folder that appears when it is whole and can be resumed.

A task writes its bytes, brings them onto the disk, and only then leaves its record; a conversion that was interrupted
goes on with the tasks that have none. The plan beside the records tells whether they belong to the same conversion.
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
from megatron_paint.base.errors import UserError
from megatron_paint.runtime.files import NewFolder, disk_errors, lock_of, sync, write_atomically
from megatron_paint.runtime.processes import start_worker

PLAN, RECORDS = "plan.json", "records"
MARKS = ("config.json", "adapter_config.json", ".metadata")  # of folders that --overwrite may replace
TASK_BYTES = 256 * 10**6
PROCESS_BYTES = 2 * 10**9  # ours: for which another process is started


@dataclass(frozen=True, kw_only=True)
class Task:
    """A share of the work: numbers of the entries that it converts, and their size."""

    number: int
    entries: tuple[int, ...]
    nbytes: int


class Job(Protocol):
    """A conversion: picklable, so that each process can make its own worker of it."""

    @property
    def sources(self) -> tuple[Path, ...]:
        """Folders that are read."""

    def plan(self) -> dict[str, Any]:
        """What makes this conversion another one than the next: sources and options."""

    def begin(self, folder: Path) -> None:
        """Makes what the tasks write into; called once, in an empty folder."""

    def tasks(self) -> Sequence[Task]: ...

    def worker(self, folder: Path) -> Callable[[Task], dict[str, Any]]:
        """A function that does a task and gives its record; made once in each process."""

    def finish(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        """Writes what describes the whole, once all tasks are done; checks that nothing is lacking."""


def cut_tasks(sizes: Sequence[int]) -> list[Task]:
    """Neighbouring entries together, about TASK_BYTES a task."""
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
    """Size and time of change of each file of a source; another number, another conversion."""
    try:
        stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); is it being moved or deleted?") from None
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def convert(
    job: Job, out: Path, *, processes: int, overwrite: bool, progress: Callable[[int], None] = lambda nbytes: None
) -> list[dict[str, Any]]:
    """Does the job into `out`, complete or absent; gives the tasks' records. `progress` is told the bytes of each task
    that is done. UserError: `out` exists and `overwrite` is not set, the disk refuses, or a source is damaged."""
    out = Path(os.path.abspath(out))
    _check_apart(out, job.sources)
    new = NewFolder(out)
    with disk_errors(out), _locked(new.unfinished):
        new.recover()
        _check_absent(out, overwrite)
        job = replace(job)  # without what it may have read of its sources before
        plan = job.plan()
        tasks = job.tasks()
        records = _begin_or_resume(job, plan, tasks, new.unfinished)
        progress(sum(task.nbytes for task in tasks if task.number in records))
        left = [task for task in tasks if task.number not in records]
        for task, record in _run(job, new.unfinished, left, processes):
            records[task.number] = record
            progress(task.nbytes)
        ordered = [records[task.number] for task in tasks]
        if job.plan() != plan:
            raise UserError(f"{job.sources[0]} changed while it was read; run the same command again when it is whole")
        job.finish(new.unfinished, ordered)
        shutil.rmtree(new.unfinished / RECORDS)
        (new.unfinished / PLAN).unlink()
        _check_absent(out, overwrite)
        new.finish(mark=False)
    return ordered


def _check_absent(out: Path, overwrite: bool) -> None:
    """UserError where something stands at `out` that is not to be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out} is {'a link' if out.is_symlink() else 'a file'}; give another folder for the output")
    if not overwrite:
        raise UserError(f"{out} exists; remove it, give another folder, or say --overwrite")
    if any(out.iterdir()) and not any((out / name).exists() for name in MARKS):
        raise UserError(f"{out} holds no checkpoint, so --overwrite does not remove it; give another folder")


def _check_apart(out: Path, sources: Sequence[Path]) -> None:
    """UserError where the output would take the place of what is read, or of a folder that holds it."""
    resolved = out.resolve()
    for source in (path.resolve() for path in sources):
        if resolved == source or resolved in source.parents or source in resolved.parents:
            raise UserError(f"{out} and {source}, which is read, lie in each other; give another folder for the output")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second conversion out of the same folder; the lock goes with the process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = lock_of(folder)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise BlockingIOError  # the other one has just ended and taken the file away
        except BlockingIOError:
            raise UserError(f"another conversion is writing {folder}; wait for it or give another folder") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _begin_or_resume(
    job: Job, plan: Mapping[str, Any], tasks: Sequence[Task], folder: Path
) -> dict[int, dict[str, Any]]:
    """Records of what an interrupted conversion with the same plan has done; else an empty start."""
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
    """Whether a record is whole, and the files that it tells of are there."""
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
            "a process of the conversion was killed, most often for want of memory: use fewer --processes; the same "
            "command goes on where it ended"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: Job
_folder: Path


def _start_worker(job: Job, folder: Path) -> None:
    global _job, _folder
    start_worker()  # Ctrl-C is for the parent, and nobody writes on when it is gone
    _job, _folder = job, folder


@cache
def _worker() -> Callable[[Task], dict[str, Any]]:
    """Made with the first task, whose result brings its errors to the parent."""
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
    """The dictionaries `name` of all records together."""
    return {key: value for record in records for key, value in record[name].items()}


def check_names(done: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """UserError unless exactly the wanted tensors are done: the records of an interrupted conversion are other people's
    files until then."""
    if done.keys() != wanted.keys():
        odd = sorted(done.keys() ^ wanted.keys())
        raise UserError(
            f"the records of the interrupted conversion are damaged: {len(odd)} tensors are lacking or too many, such "
            f"as {odd[0]}; remove the unfinished folder and start again"
        )


def processes_for(nbytes: int, asked: int | None) -> int:
    """The number of processes to use: one a core, at most 8, fewer where starting one takes longer than its share."""
    if asked is not None and asked < 1:
        raise UserError(f"--processes must be at least 1, got {asked}")
    return asked or max(1, min(8, len(os.sched_getaffinity(0)), nbytes // PROCESS_BYTES))
