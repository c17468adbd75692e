"""The benchmarks that are known by name, and problem files in their place.

Names stand for sets on the Hugging Face hub, which `datasets` loads (from its cache where there is no network). A file
is a benchmark too: `id`, `problem`, `answer`, and its name is the file's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import ColumnSettings, EvaluationSettings
from megatron_paint.data.problems import PromptLimit, load_held_out
from megatron_paint.data.rows import JSONL_ENDINGS, nearest
from megatron_paint.records import Problem


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a benchmark's problems come from; answer_mark: the answer is what follows its last occurrence."""

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
    """Problems to evaluate on, under the name that reports give them."""

    name: str
    problems: tuple[Problem, ...]


def names_in(text: str) -> tuple[str, ...]:
    """The names and files of a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def load_benchmarks(
    names: Sequence[str], settings: EvaluationSettings, *, prompt_limit: PromptLimit | None = None
) -> tuple[Benchmark, ...]:
    """The benchmarks of these names or files; UserError that names the one that is not known or cannot be read."""
    found = [_load(name, settings, prompt_limit) for name in names]
    for number, benchmark in enumerate(found):
        if benchmark.name == "summary":
            raise UserError(f"--benchmarks: {names[number]} would take the place of the summary; rename the file")
        if benchmark.name in {earlier.name for earlier in found[:number]}:
            raise UserError(f"--benchmarks names {benchmark.name!r} twice; leave one out, or rename a file")
    return tuple(found)


def _load(name: str, settings: EvaluationSettings, prompt_limit: PromptLimit | None) -> Benchmark:
    source = NAMED.get(name)
    if source is None:
        _check_file(name)
        loaded = load_held_out(replace(settings, problems=name), prompt_limit=prompt_limit)
        return Benchmark(name=Path(name).stem, problems=loaded.problems)
    settings = replace(settings, problems=source.path, split=source.split, columns=source.columns, format="datasets")
    problems = load_held_out(settings, prompt_limit=prompt_limit).problems
    if source.answer_mark:
        problems = tuple(replace(problem, answer=_after(source.answer_mark, problem)) for problem in problems)
    return Benchmark(name=name, problems=problems)


def _check_file(name: str) -> None:
    """What is neither known nor a file may still be a name for `datasets`, if it looks like one."""
    path = Path(name)
    if path.suffix in (*JSONL_ENDINGS, ".parquet") or path.exists() or "/" in name:
        return
    raise UserError(
        f"--benchmarks: {name!r} is neither a known benchmark nor a file; known are {', '.join(NAMED)}."
        f"{nearest(name, NAMED)}"
    )


def _after(mark: str, problem: Problem) -> str:
    _, found, answer = problem.answer.rpartition(mark)
    if not found:
        raise UserError(f"{problem.source}: the answer holds no {mark!r}, behind which this benchmark has it")
    return answer.strip().replace(",", "")
