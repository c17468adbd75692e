"""Weights & Biases: metrics, settings, evaluations and samples of a run."""

import atexit
import os
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.run.loggers.interface import PROJECT, Outcome, RunInfo, SampleTable
from megatron_paint.run.loggers.remote_ids import read_ids, write_ids

MISSING = "it is not installed: pip install 'megatron-paint[wandb]'"
NO_LOGIN = "no API key is known: run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline"
INIT_SECONDS = 60.0
FINISH_SECONDS = 45.0  # less than the limit of `BackgroundLogger`
EXIT_SECONDS = 30.0  # most that the end of the process waits for W&B's own process
SERVICE = "wandb-core"  # W&B's own process, a child of this one


class WandbLogger:
    """Logs with the library `wandb`, whose environment variables hold (WANDB_MODE, WANDB_ENTITY, WANDB_TAGS, ...).

    Every number is plotted over the metric `step`, and not over W&B's own counter: that one cannot go back, and a
    resumed run makes steps again.
    """

    name = "wandb"
    fix = "WANDB_MODE=offline keeps the data in run.dir, and `wandb sync` sends it later"
    in_background = True

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self._run: Any = None
        self._wandb: Any = None

    def open(self) -> str:
        try:
            import wandb
        except ImportError as error:
            raise UserError(MISSING) from error
        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE", "online")
        is_online = mode in ("online", "run", "shared")
        if is_online and not _has_key(wandb):
            raise UserError(NO_LOGIN)
        stored = read_ids(self.info.folder, self.name)
        run_id = stored.get("id") or secrets.token_hex(4)
        # Before the run exists there: a start that is killed meanwhile continues it.
        write_ids(self.info.folder, self.name, {**stored, "id": run_id})
        atexit.unregister(_EXIT_LIMIT.begin)
        try:
            self._run = self._init(wandb, run_id, stored, is_online=is_online)
        finally:
            _EXIT_LIMIT.watch()
            atexit.register(_EXIT_LIMIT.begin)  # after W&B's own function, so it is called before that one
        self._run.config.update(dict(self.info.settings), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        ids = {**stored, "id": run_id, "entity": self._run.entity, "project": self._run.project}
        write_ids(self.info.folder, self.name, {name: value for name, value in ids.items() if value})
        if is_online:
            return f"logging to {self._run.url}"
        return f"logging to {self.info.folder / 'wandb'}; `wandb sync` sends it"

    def _init(self, wandb: Any, run_id: str, stored: Mapping[str, str], *, is_online: bool) -> Any:
        return wandb.init(
            id=run_id,
            resume="allow" if is_online else None,  # a run that is not online ignores it with a warning
            entity=stored.get("entity") or None,
            project=stored.get("project") or self.info.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=self.info.name or os.environ.get("WANDB_NAME") or self.info.folder.name,
            dir=str(self.info.folder),
            settings=wandb.Settings(
                console="off",  # it would send what other programs print
                silent=True,
                init_timeout=INIT_SECONDS,
                x_disable_meta=True,  # it has the command line, which may hold secrets
                **(
                    {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
                    if _has_finish_limit(wandb)
                    else {}
                ),
            ),
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def samples(self, step: int, table: SampleTable) -> None:
        shown = self._wandb.Table(
            columns=list(table.columns), data=[list(row) for row in table.rows], allow_mixed_types=True
        )
        self._run.log({"samples": shown, "step": step})

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=1 if outcome == "failed" else 0)

    def is_temporary(self, error: Exception) -> bool:
        return False  # wandb repeats its requests itself


def _has_finish_limit(wandb: Any) -> bool:
    """Whether this version of wandb can end without a network. An older one waits for it when the process ends."""
    return "finish_timeout" in getattr(wandb.Settings, "model_fields", ())


def _has_key(wandb: Any) -> bool:
    """Whether wandb knows an API key or another login. Without one, `wandb.init` would ask on a terminal."""
    if "prompt" in signature(wandb.login).parameters:  # of newer versions
        return wandb.login(prompt=False)
    return wandb.api.api_key is not None


class _ExitLimit:
    """Kills W&B's own process if this process takes too long to end: W&B waits for its process without a limit.

    The thread starts before the end, because Python 3.12 starts no thread while it ends.
    """

    def __init__(self) -> None:
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Starts the thread, if it does not run in this process."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._wait, name="limit of W&B's end", daemon=True)
            self._thread.start()

    def begin(self) -> None:
        """This process begins to end: from now on W&B's process has `EXIT_SECONDS`."""
        self._ending.set()

    def _wait(self) -> None:
        self._ending.wait()
        time.sleep(EXIT_SECONDS)
        end_service()


_EXIT_LIMIT = _ExitLimit()


def end_service() -> None:
    """Kills W&B's own process. What it has not sent is in run.dir."""
    for pid in service_processes():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def service_processes() -> list[int]:
    """The ids of W&B's own processes that this process has started."""
    children, found = [], []
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            children += task.read_text().split()
    for pid in children:
        with suppress(OSError):  # the process has ended meanwhile
            if Path(f"/proc/{pid}/comm").read_text().strip() == SERVICE:
                found.append(int(pid))
    return found
