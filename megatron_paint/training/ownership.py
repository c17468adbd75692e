"""Who owns a run: the process that holds the lock of its folder, and writes its log."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.markup import escape

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import Settings
from megatron_paint.launch.failure_notes import NOTES_FOLDER, leave_failure_note
from megatron_paint.run.console_log import ConsoleLog
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.lock import RunLock, locked
from megatron_paint.run.lock_watch import LOCK, read_lock

if TYPE_CHECKING:
    from megatron_paint.mcore.ranks import Ranks

SHARED = "run_lock"  # file of the launcher's folder


def share_lock(lock: RunLock, folder: str | Path) -> None:
    """Tells rank 0 of the ranks that this process starts that the run is theirs. folder: the launcher's."""
    (Path(folder) / SHARED).write_text(lock.owner.token, encoding="ascii")


@dataclass(frozen=True, kw_only=True)
class OwnedRun:
    """A run folder that these ranks own."""

    confirm: Callable[[], None]  # on all ranks: raises UserError if another process has taken the run over
    log: ConsoleLog | None  # on rank 0
    warnings: tuple[str, ...]  # on rank 0


@contextmanager
def owned_run(
    settings: Settings, ranks: "Ranks", *, lock: RunLock | None, log: ConsoleLog | None
) -> Iterator[OwnedRun]:
    """Takes the lock of the run folder on rank 0, and opens the run's log there, unless this process has done so.

    UserError: another process owns the run.
    """
    from megatron_paint.mcore.collectives import rank_zero_does

    folder, held, warnings = RunFolder(settings.run.dir), [], []
    with ExitStack() as stack:
        on_rank_zero = partial(rank_zero_does, ranks)
        on_rank_zero(lambda: held.append(lock or _own(folder.path, stack, say=warnings.append)))
        if log is None and ranks.rank == 0:
            log = ConsoleLog()
            log.open(folder.logs, command=None if _shared_file().is_file() else ["megatron-paint", *sys.argv[1:]])
            stack.callback(log.close)
        confirm = partial(on_rank_zero, lambda: held[0].confirm())
        try:
            yield OwnedRun(confirm=confirm, log=log, warnings=tuple(warnings))
        except UserError as error:
            if log is not None and NOTES_FOLDER not in os.environ:  # else the launcher does it
                log.add(escape(f"megatron-paint: error: {error}"))
            raise
        except Exception:
            if log is not None and NOTES_FOLDER not in os.environ:
                log.add(escape(traceback.format_exc()))
            raise


def _own(folder: Path, stack: ExitStack, *, say: Callable[[str], None]) -> RunLock:
    """Takes the lock, or joins the launcher of this rank that holds it. `stack` releases it.

    say: gets a line about the dead owner that it was taken from.
    """
    if not _shared_file().is_file():
        on_wait = partial(print, file=sys.stderr, flush=True)  # there is no console yet
        return stack.enter_context(locked(folder, say=say, on_lost=end_process, on_wait=on_wait))
    held = read_lock(folder / LOCK)
    if held is None or held.token != _shared_file().read_text(encoding="ascii"):
        raise UserError(f"run.dir={folder}: the launcher of this rank has lost the run to {held or 'nobody'}")
    lock = RunLock(folder, owner=held)
    lock.join(on_lost=end_process)
    stack.callback(lock.stop)
    return lock


def _shared_file() -> Path:
    """The file of `share_lock`, which exists only in the ranks of a launcher that owns the run."""
    return Path(os.environ.get(NOTES_FOLDER, os.devnull)) / SHARED


def end_process(message: str) -> NoReturn:
    """Ends this process, whose run another process has taken over, before it writes anything more."""
    text = f"megatron-paint: error: {message}"
    if not leave_failure_note(text, mistake=True):
        print(text, file=sys.stderr, flush=True)
    os._exit(2)
