"""Loads benchmarks by name or from problem files.

A known name is a data set on the Hugging Face hub. `datasets` loads it, without a network from its cache. Everything
that `data.train` takes is a benchmark too, with the columns of `evaluation.columns`: a file, a folder, or a data set
that `datasets` knows. The benchmark then has the name of the file, folder or data set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.config.domains import DomainSettings
from megatron_paint.config.settings import ColumnSettings, EvaluationSettings
from megatron_paint.data.data_file import stem_of
from megatron_paint.data.problems import load_held_out
from megatron_paint.data.rows import nearest
from megatron_paint.data.sources import is_data_file
from megatron_paint.records import Problem

Domains = Mapping[str, DomainSettings]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data set of a benchmark. marked: each answer is a worked solution that ends in "#### RESULT"."""

    path: str
    split: str
    columns: ColumnSettings
    marked: bool = False


NAMED = {
    "aime24": Source(path="HuggingFaceH4/aime_2024", split="train", columns=ColumnSettings()),
    "aime25": Source(path="yentinglin/aime_2025", split="train", columns=ColumnSettings()),
    "hmmt25": Source(path="MathArena/hmmt_feb_2025", split="train", columns=ColumnSettings(id="problem_idx")),
    "math500": Source(path="HuggingFaceH4/MATH-500", split="test", columns=ColumnSettings(id="unique_id")),
    "gsm8k": Source(
        path="openai/gsm8k:main",
        split="test",
        columns=ColumnSettings(problem="question"),
        marked=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Problems to evaluate on, and their name in reports."""

    name: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()  # messages to the user
    warnings: tuple[str, ...] = ()


def names_in(text: str) -> tuple[str, ...]:
    """Splits a list of names and files at its commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def load_benchmarks(
    names: Sequence[str], settings: EvaluationSettings, *, domains: Domains | None = None
) -> tuple[Benchmark, ...]:
    """Loads the benchmarks of these names or files. domains: the section of this name.

    Raises UserError that names a benchmark that is unknown, appears twice or cannot be read.
    """
    found = [load_benchmark(name, settings, domains=domains) for name in names]
    for number, benchmark in enumerate(found):
        if benchmark.name == "summary":
            raise UserError(f"--benchmarks: {names[number]} would overwrite the summary; rename the file")
        if benchmark.name in {earlier.name for earlier in found[:number]}:
            raise UserError(f"--benchmarks has {benchmark.name!r} twice; leave one out, or rename a file")
    return tuple(found)


def load_benchmark(name: str, settings: EvaluationSettings, *, domains: Domains | None = None) -> Benchmark:
    """Loads one benchmark: a known name, or what `data.train` takes. Raises UserError if it cannot be read."""
    source = NAMED.get(name)
    if source is None:
        _check_is_source(name, settings)
        settings = replace(settings, problems=name)
    else:
        settings = replace(
            settings, problems=source.path, split=source.split, columns=source.columns, format="datasets"
        )
    loaded = load_held_out(settings, needs_mark=source is not None and source.marked, domains=domains)
    return Benchmark(
        name=benchmark_name(name),
        problems=loaded.problems,
        notes=loaded.notes,
        warnings=loaded.warnings,
    )


def benchmark_name(source: str) -> str:
    """Returns the name in reports and of their files: that of a file, folder or data set without its owner."""
    path = Path(source)
    if source in NAMED:
        return source
    if is_data_file(source) or path.is_file():
        return stem_of(path)
    return path.resolve().name if path.is_dir() else source.rpartition("/")[2].replace(":", "_")


def _check_is_source(name: str, settings: EvaluationSettings) -> None:
    """Raises UserError for a name that is most likely a misspelt benchmark: a word near one that is no file."""
    path = Path(name)
    meant = nearest(name, NAMED)
    if not meant or is_data_file(name) or path.exists() or "/" in name or settings.format != "auto":
        return
    raise UserError(
        f"--benchmarks, evaluation.problems: {name!r} is neither a known benchmark nor a file. The known benchmarks "
        f"are {', '.join(NAMED)}.{meant} For a data set of this name, set evaluation.format: datasets"
    )
