"""Loads benchmarks by name or from problem files.

A name is a data set on the Hugging Face hub. `datasets` loads it, without a network from its cache. A file is a
benchmark too: it has the columns `id`, `problem` and `answer`. The benchmark then has the name of the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import ColumnSettings, EvaluationSettings
from megatron_paint.data.problems import load_held_out
from megatron_paint.data.rows import JSONL_ENDINGS, nearest
from megatron_paint.records import Problem


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data set of a benchmark. answer_mark: the answer is the text after the last occurrence of this mark."""

    path: str
    split: str
    columns: ColumnSettings
    answer_mark: str = ""


NAMED = {
    "aime24": Source(path="HuggingFaceH4/aime_2024", split="train", columns=ColumnSettings()),
    "aime25": Source(path="yentinglin/aime_2025", split="train", columns=ColumnSettings()),
    "hmmt25": Source(path="MathArena/hmmt_feb_2025", split="train", columns=ColumnSettings(id="problem_idx")),
    "math500": Source(path="HuggingFaceH4/MATH-500", split="test", columns=ColumnSettings(id="unique_id")),
    "gsm8k": Source(
        path="openai/gsm8k:main",
        split="test",
        columns=ColumnSettings(problem="question"),
        answer_mark="####",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Problems to evaluate on, and their name in reports."""

    name: str
    problems: tuple[Problem, ...]


def names_in(text: str) -> tuple[str, ...]:
    """Splits a list of names and files at its commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def load_benchmarks(names: Sequence[str], settings: EvaluationSettings) -> tuple[Benchmark, ...]:
    """Loads the benchmarks of these names or files.

    Raises UserError that names a benchmark that is unknown, appears twice or cannot be read.
    """
    found = [_load(name, settings) for name in names]
    for number, benchmark in enumerate(found):
        if benchmark.name == "summary":
            raise UserError(f"--benchmarks: {names[number]} would overwrite the summary; rename the file")
        if benchmark.name in {earlier.name for earlier in found[:number]}:
            raise UserError(f"--benchmarks has {benchmark.name!r} twice; leave one out, or rename a file")
    return tuple(found)


def _load(name: str, settings: EvaluationSettings) -> Benchmark:
    source = NAMED.get(name)
    if source is None:
        _check_file(name)
        loaded = load_held_out(replace(settings, problems=name))
        return Benchmark(name=Path(name).stem, problems=loaded.problems)
    settings = replace(settings, problems=source.path, split=source.split, columns=source.columns, format="datasets")
    problems = load_held_out(settings).problems
    if source.answer_mark:
        problems = tuple(replace(problem, answer=_after(source.answer_mark, problem)) for problem in problems)
    return Benchmark(name=name, problems=problems)


def _check_file(name: str) -> None:
    """Raises UserError unless the name is a file or looks like a name for `datasets`."""
    path = Path(name)
    if path.suffix in (*JSONL_ENDINGS, ".parquet") or path.exists() or "/" in name:
        return
    raise UserError(
        f"--benchmarks: {name!r} is neither a known benchmark nor a file. The known benchmarks are {', '.join(NAMED)}."
        f"{nearest(name, NAMED)}"
    )


def _after(mark: str, problem: Problem) -> str:
    _, found, answer = problem.answer.rpartition(mark)
    if not found:
        raise UserError(f"{problem.source}: the answer has no {mark!r}; this benchmark has the answer after this mark")
    return answer.strip().replace(",", "")
