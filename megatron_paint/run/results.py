"""The results of a run, read from its folder: at the end of the run, and whenever a finished run is started again."""

import shlex
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import dotted, read_config
from megatron_paint.config.schedule import due_after
from megatron_paint.config.secrets import recorded_tree, without_secrets
from megatron_paint.config.settings import Settings
from megatron_paint.records import EvalReport
from megatron_paint.run.console import Progress
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.learning_watch import LearningWatch
from megatron_paint.run.live_line import duration
from megatron_paint.runtime.checksums import Damaged, damage, read_checksums

MAY_DIFFER = ("run.dir", "run.resume", "run.allow_changes")  # settings that change nothing in a finished run
READERS = 4  # threads that compute checksums; ours


def print_results(folder: RunFolder, progress: Progress, *, last: int) -> None:
    """Prints what taught nothing, where to look next, and the evaluations before the run and after its step `last`."""
    metrics, watch = folder.read_metrics(), LearningWatch()
    for line in metrics:
        watch.update(line)
    for warning in watch.summary():
        progress.warn(warning)
    phases = time_by_phase(metrics)
    if phases:
        progress.note(shares_text("time of the steps", phases), **{f"time/{name}": s for name, s in phases.items()})
    for line in look_next(folder, last=last):
        progress.note(line)
    before, after = _evaluation(folder, 0), _evaluation(folder, last)
    progress.end(before=before if after else [], after=after, folder=str(folder.path))


def time_by_phase(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of all steps by phase; `other` is the rest of the steps. lines: of metrics.jsonl."""
    found: dict[str, float] = {}
    total = 0.0
    for line in lines:
        if line.get("tokens_per_second") and "num_tokens" in line:
            total += line["num_tokens"] / line["tokens_per_second"]
        for key, seconds in line.items():
            if key.startswith("time/") and seconds:
                name = key.removeprefix("time/").removesuffix("_s")
                found[name] = found.get(name, 0.0) + seconds
    rest = total - sum(found.values())
    if rest > 0:
        found["other"] = rest
    return found


def shares_text(title: str, seconds: Mapping[str, float]) -> str:
    """A line with the times of parts and their shares, the longest first."""
    total = sum(seconds.values())
    if not total:
        return f"{title}: {duration(0)}"
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {duration(value)} ({value / total:.0%})" for name, value in longest_first)
    return f"{title}: {duration(total)}: {parts}"


def look_next(folder: RunFolder, *, last: int) -> list[str]:
    """Commands that can be pasted into a shell, each with what it shows."""
    commands = {
        ("megatron-paint", "report", str(folder.path)): "curves and every sample as a web page",
        ("megatron-paint", "inspect", "samples", str(folder.path), str(last)): "a sample of the last step",
        ("megatron-paint", "status", str(folder.path)): "speed, checkpoints and attempts",
        ("tail", "-n", "1", str(folder.metrics_file)): "the metrics of the last step",
        ("ls", str(folder.hf_folder(last))): "the exported Hugging Face checkpoint",
    }
    lines = [(shlex.join(command), meaning) for command, meaning in commands.items()]
    width = max(len(command) for command, _ in lines)
    return ["Look next:", *(f"  {command:<{width}}  # {meaning}" for command, meaning in lines)]


def _evaluation(folder: RunFolder, step: int) -> list[EvalReport]:
    return [folder.read_eval(step)] if folder.holds("evaluation", step) else []


def is_finished(folder: RunFolder, settings: Settings) -> bool:
    """Whether a run with exactly these settings is complete in its folder, and may be resumed.

    Resuming such a run would only print its results. The answer is False where a setting differs, where anything of the
    last step is missing, and where the last checkpoint is damaged. UserError: the disk refuses to read the checkpoint.
    """
    if settings.run.resume == "never" or not _has_same_settings(folder, settings):
        return False
    last = settings.run.steps
    due = [(task, last) for task in due_after(last, settings.run)]
    if settings.evaluation.problems is None:
        due.remove(("evaluation", last))
    else:
        due.append(("evaluation", 0))
    files = (folder.metrics_file, folder.samples_file(last))
    complete = folder.latest_checkpoint() == last and all(folder.holds(task, step) for task, step in due)
    return complete and all(file.is_file() for file in files) and _is_whole(folder.checkpoint_folder(last))


def _has_same_settings(folder: RunFolder, settings: Settings) -> bool:
    try:
        before = dotted(without_secrets(read_config(folder.config_file)))
    except UserError:
        return False  # the usual start finds out what is wrong
    now = dotted(recorded_tree(settings))
    for key in MAY_DIFFER:
        before[key] = now[key]  # an earlier version may not have had it
    return before == now


def _is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint has checksums, and every file has its own."""
    try:
        checksums = read_checksums(checkpoint)
    except Damaged:
        return False
    if not checksums:
        return False  # of an earlier version, or damaged: the usual start distinguishes them
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: damage(checkpoint, {name: checksums[name]}), checksums)
        return all(what is None for what in found)
