"""Runs a function on one rank or on all, and shares its result or its UserError with all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_paint.base.errors import UserError
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.runtime.files import NewFolder, disk_errors

T = TypeVar("T")


def rank_zero_does(ranks: Ranks, act: Callable[[], T]) -> T:
    """The result of `act` on rank 0, returned on all ranks; if it raises a UserError, all ranks raise it."""
    box: list[object] = [None, None]
    if ranks.rank == 0:
        try:
            box[0] = act()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=ranks.host_group)
    if box[1] is not None:
        raise UserError(str(box[1]))
    return box[0]


def first_reason(ranks: Ranks, reason: str | None) -> str | None:
    """The reason of the first rank that has one, returned on all ranks; None: no rank has one."""
    everyone: list[str | None] = [None] * ranks.size
    dist.all_gather_object(everyone, reason, group=ranks.host_group)
    return next((found for found in everyone if found is not None), None)


def all_ranks_do(ranks: Ranks, act: Callable[[], T]) -> list[T]:
    """The results of `act` on all ranks, by rank; if it raises a UserError on any rank, all ranks raise the first one.

    A rank that fails waits here for the others, so `act` must not leave them waiting in another collective.
    """
    result, problem = None, None
    try:
        result = act()
    except UserError as error:
        problem = str(error)
    everyone: list[tuple[T, str | None]] = [(None, None)] * ranks.size
    dist.all_gather_object(everyone, (result, problem), group=ranks.host_group)
    if problems := [problem for _, problem in everyone if problem is not None]:
        raise UserError(problems[0])
    return [result for result, _ in everyone]


def fill_folder(
    path: str | Path,
    ranks: Ranks,
    *,
    write: Callable[[Path], T],
    finish: Callable[[Path, list[T]], None],
    mark: bool = False,
) -> None:
    """All ranks fill a new folder, which then replaces `path` as one. If one rank cannot write, all ranks stop.

    write: writes a rank's part into the folder; finish: rank 0 completes the folder, with the results of all parts;
    mark: write the file `complete`, last of all. UserError: writing failed; the old content of `path` is intact.
    """
    finish_folder(begin_folder(path, ranks), ranks, write=write, finish=finish, mark=mark)


def begin_folder(path: str | Path, ranks: Ranks) -> NewFolder:
    """The first part of `fill_folder`: an unfinished folder for all ranks to write into."""
    folder = NewFolder(path)
    with discarded_on_error(folder, ranks):
        rank_zero_does(ranks, folder.begin)
    return folder


@contextmanager
def discarded_on_error(folder: NewFolder, ranks: Ranks) -> Iterator[None]:
    """Removes an unfinished folder if all ranks raise a UserError inside."""
    try:
        yield
    except UserError:
        if ranks.rank == 0:
            folder.discard()
        raise


def finish_folder(
    folder: NewFolder,
    ranks: Ranks,
    *,
    write: Callable[[Path], T],
    finish: Callable[[Path, list[T]], None],
    mark: bool = False,
) -> None:
    """The second part of `fill_folder`."""

    def write_part() -> T:
        with disk_errors(folder.path):
            return write(folder.unfinished)

    def put_in_place(parts: list[T]) -> None:
        with disk_errors(folder.path):
            finish(folder.unfinished, parts)
        folder.finish(mark=mark)

    with discarded_on_error(folder, ranks):
        parts = all_ranks_do(ranks, write_part)
        rank_zero_does(ranks, lambda: put_in_place(parts))


def gather_entries(mine: dict[int, Any], ranks: Ranks) -> dict[int, Any]:
    """The entries of all ranks together, on every rank; all ranks call together."""
    everyone: list[dict[int, Any]] = [{} for _ in range(ranks.size)]
    dist.all_gather_object(everyone, mine, group=ranks.host_group)
    return {index: value for entries in everyone for index, value in entries.items()}
