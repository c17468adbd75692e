"""Reads a run folder for the report. What is missing or damaged becomes a notice of one line, never an error."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import read_config
from megatron_paint.config.secrets import without_secrets
from megatron_paint.evaluation.summary import read_report
from megatron_paint.report.answers import COLUMNS as ANSWER_COLUMNS
from megatron_paint.report.answers import answer_pages, with_changes
from megatron_paint.report.console_events import Console, read_console, start_at_step, start_at_time
from megatron_paint.report.curves import columns, is_number, phases
from megatron_paint.report.evaluations import DAMAGED, AddPage, Known, evaluation_file, read_evaluations, stamp_of
from megatron_paint.report.samples import COLUMNS as SAMPLE_COLUMNS
from megatron_paint.report.samples import SampleFile, list_row, page_content, read_sample_file
from megatron_paint.report.token_texts import TokenTexts
from megatron_paint.run.console_log import CONSOLE_LOG
from megatron_paint.run.decoder import load_run_decoder, setting_at
from megatron_paint.run.folder import CHANGES, STEP_NAME, RunFolder


@dataclass(kw_only=True)
class RunData:
    """A run without the details of its samples and answers."""

    tree: dict[str, Any] | None  # its settings; None: not known
    summary: dict[str, Any]  # everything else that the page shows, as JSON
    sample_rows: list[list[Any]] = field(default_factory=list)  # of all steps, see samples.COLUMNS
    answer_rows: list[list[Any]] = field(default_factory=list)  # of all evaluations, see answers.COLUMNS


class RunReader:
    """Reads one run, also again and again while it trains: files that did not change are not read again."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self._evaluations: Known = {}
        self._rows: dict[Path, tuple[tuple[int, int], list[list[Any]], int]] = {}
        self._texts: TokenTexts | None = None
        self._tokenizer_error = ""
        self._has_loaded = False
        self._opened: tuple[Any, dict[str, dict[str, Any]]] = (None, {})  # an evaluation, and its pages of answers

    def check(self) -> None:
        """UserError: the folder is no run folder."""
        folder = self.folder
        if not folder.path.is_dir():
            raise UserError(f"{folder.path} is no folder; give the run.dir of a run")
        there = (folder.config_file, folder.metrics_file, folder.path / "samples")
        if not any(path.exists() for path in there):
            raise UserError(
                f"{folder.path} is not a run folder: it has no config.yaml, metrics.jsonl or samples. Give the run.dir "
                "of a run"
            )

    def read(self, add_page: AddPage | None = None) -> RunData:
        """Reads everything except the details of samples and answers.

        add_page: gets the pages with these details, one by one, each with its key within the run.
        """
        notices: list[str] = []
        tree = self._settings(notices)
        lines = self._metrics(notices)
        evaluations, damaged = read_evaluations(self.folder, self._evaluations, add_page)
        notices += damaged
        rows = list(self._sample_rows(notices, tree, add_page))
        if rows and self.texts(tree) is None:
            notices.append(f"responses are shown without tokens: {self._tokenizer_error}")
        done = [line for line in lines if "skipped" not in line]
        steps = _planned(tree)
        last = max((line["step"] for line in lines), default=0)
        changes, console = self._changes(notices), self._console(notices)
        skipped = [(line["step"], str(line["skipped"])) for line in lines if "skipped" in line]
        summary = {
            "folder": str(self.folder.path),
            "objective": setting_at(tree, "objective", "name"),
            "model": setting_at(tree, "model", "hf_path"),
            "planned": steps,
            "last": last,
            "finished": steps is not None and last >= steps,
            "tokens": sum(value for line in done if is_number(value := line.get("num_tokens"))),
            "steps": [line["step"] for line in done],
            "metrics": (metrics := columns(done)),
            "phases": phases(list(metrics)),
            "skipped": [[step, text, start_at_step(console.starts, step)] for step, text in skipped],
            "evaluations": [one.row for one in evaluations],
            "changes": [{**one, "start": start_at_time(console.starts, one["time"])} for one in changes],
            "starts": [asdict(start) for start in console.starts],
            "events": [asdict(event) for event in console.events],
            "facts": console.facts,
            "notices": notices,
        }
        asked = list(with_changes([row for one in evaluations for row in one.problems]))
        return RunData(tree=tree, summary=summary, sample_rows=rows, answer_rows=asked)

    def sample_files(self) -> Iterator[tuple[int, Path]]:
        """The files of samples in the order of steps."""
        folder = self.folder.path / "samples"
        found = []
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.suffix == ".jsonl" and (match := STEP_NAME.fullmatch(file.stem)):
                found.append((int(match[1]), file))
        return iter(sorted(found))

    def page(self, key: str, tree: dict[str, Any] | None) -> dict[str, Any] | None:
        """One page by its key within the run; None: there is none."""
        name, part = key.rsplit("_", 1)
        try:
            if name.startswith("e"):
                return self._answer_pages(int(name[1:])).get(key)
            content = read_sample_file(self.folder.samples_file(int(name)), int(name))
        except DAMAGED:
            return None
        return page_content(content.pages[int(part)], self.texts(tree)) if int(part) < len(content.pages) else None

    def _answer_pages(self, step: int) -> dict[str, dict[str, Any]]:
        """The pages of one evaluation by their keys. A search asks for all of them, one by one: the last ones stay."""
        file = evaluation_file(self.folder, step)
        version = (step, stamp_of(file))
        if self._opened[0] != version:
            pages = answer_pages(read_report(file), step)
            self._opened = (version, {key: content for key, _, content in pages})
        return self._opened[1]

    def texts(self, tree: dict[str, Any] | None) -> TokenTexts | None:
        """The decoder of the run's tokenizer: the model's, or that of an export in the run folder. None: neither is."""
        if self._has_loaded:
            return self._texts
        self._has_loaded = True
        decode, self._tokenizer_error = load_run_decoder(self.folder, tree)
        self._texts = None if decode is None else TokenTexts(decode)
        return self._texts

    def _settings(self, notices: list[str]) -> dict[str, Any] | None:
        try:
            return without_secrets(read_config(self.folder.config_file))  # earlier versions have written them
        except UserError as error:
            notices.append(f"the settings are not known: {_first_sentence(error)}")
            return None

    def _metrics(self, notices: list[str]) -> list[dict[str, Any]]:
        file, found, bad = self.folder.metrics_file, {}, 0
        for line in _lines(file, notices, "there are no curves"):
            try:
                content = json.loads(line, parse_constant=lambda _: None)
                found[int(content["step"])] = {**content, "step": int(content["step"])}
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                bad += 1
        if bad:
            notices.append(
                f"{file.name}: {count_text(bad, 'line')} cannot be read and {agreeing(bad, 'is', 'are')} left out"
            )
        return [found[step] for step in sorted(found)]

    def _sample_rows(
        self, notices: list[str], tree: dict[str, Any] | None, add_page: AddPage | None
    ) -> Iterator[list[Any]]:
        bad_lines = bad_files = files = 0
        for step, file in self.sample_files():
            files += 1
            try:
                status = file.stat()
                stamp = (status.st_mtime_ns, status.st_size)
                if add_page is not None or self._rows.get(file, (None,))[0] != stamp:
                    content = read_sample_file(file, step)
                    self._rows[file] = (stamp, _rows(content), content.bad_lines)
            except OSError:
                bad_files += 1
                continue
            _, rows, bad = self._rows[file]
            bad_lines += bad
            yield from rows
            for part, samples in enumerate(content.pages if add_page is not None else ()):
                add_page(content.page_key(part), page_content(samples, self.texts(tree)))
        if not files:
            notices.append("there are no samples: the run folder has no files in samples/")
        if bad_lines:
            notices.append(
                f"samples/: {count_text(bad_lines, 'line')} cannot be read and {agreeing(bad_lines, 'is', 'are')} left "
                "out"
            )
        if bad_files:
            notices.append(
                f"samples/: {count_text(bad_files, 'file')} cannot be read and {agreeing(bad_files, 'is', 'are')} left "
                "out"
            )

    def _changes(self, notices: list[str]) -> list[dict[str, Any]]:
        file, found = self.folder.path / CHANGES, []
        if not file.exists():
            return found
        for line in _lines(file, notices, "changes of settings are not known"):
            try:
                content = json.loads(line)
                found.append({name: str(content[name]) for name in ("after_step", "setting", "old", "new", "time")})
            except (ValueError, TypeError, KeyError, RecursionError):
                notices.append(f"{file.name}: a line cannot be read and is left out")
        return found

    def _console(self, notices: list[str]) -> Console:
        lines = _lines(self.folder.logs / CONSOLE_LOG, notices, "warnings are not known")
        return read_console("\n".join(lines))


def _rows(content: SampleFile) -> list[list[Any]]:
    rows = []
    for part, samples in enumerate(content.pages):
        page = content.page_key(part)
        rows += [list_row(sample, step=content.step, page=page, place=place) for place, sample in enumerate(samples)]
    return rows


def sample_columns(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """The list of samples of all runs."""
    return _columns(SAMPLE_COLUMNS, [data.sample_rows for data in runs])


def answer_columns(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """The list of answers of all runs."""
    return _columns(ANSWER_COLUMNS, [data.answer_rows for data in runs])


def _columns(names: Sequence[str], rows_of_runs: Sequence[list[list[Any]]]) -> dict[str, list[Any]]:
    """The rows of all runs as one list for each column; `run` is the number of the run.

    A column without a value in any row is left out.
    """
    rows = [row for of_run in rows_of_runs for row in of_run]
    found: dict[str, list[Any]] = {"run": [number for number, of_run in enumerate(rows_of_runs) for _ in of_run]}
    for place, name in enumerate(names):
        values = [row[place] for row in rows]
        if not rows or any(value is not None for value in values):
            found[name] = values
    return found


def _lines(file: Path, notices: list[str], loss: str) -> list[str]:
    """The lines of a file that are not empty; a notice that says what is lost if it cannot be read."""
    try:
        return [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line]
    except FileNotFoundError:
        notices.append(f"{loss}: there is no {file.name}")
    except OSError as error:
        notices.append(f"{loss}: {file.name} cannot be read ({error.strerror})")
    return []


def _planned(tree: dict[str, Any] | None) -> int | None:
    steps = setting_at(tree, "run", "steps")
    return steps if isinstance(steps, int) else None


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(";")[0]
