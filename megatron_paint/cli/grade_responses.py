"""Grades responses that are there: of another program, or of an evaluation that was only sampled.

A JSON object a line: `id` (the problem's), `response` (text), and if known `sample` (default: the order of the lines of
a problem), `finished` (default true) and `num_tokens`.
"""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate import finish
from megatron_paint.cli.evaluate_options import DEFAULT_OUT
from megatron_paint.config.load import override_tree, settings_of
from megatron_paint.evaluation.benchmarks import Benchmark, load_benchmarks, names_in
from megatron_paint.evaluation.evaluator import grade_all
from megatron_paint.evaluation.statistics import build_report
from megatron_paint.grading.grade import GradingPool
from megatron_paint.records import EvalReport, Graded
from megatron_paint.run.console import Mode, Progress


def grade_recorded(
    responses: Path, benchmarks: str, out: Path | None, *, overrides: Sequence[str], mode: Mode
) -> list[EvalReport]:
    """Reports of recorded responses to benchmarks, written and said; every problem needs equally many responses."""
    bare = {"model": {"hf_path": "none"}, "data": {"train": "none"}, "run": {"dir": "none"}}
    settings = settings_of(override_tree(bare, overrides)).evaluation
    found = load_benchmarks(names_in(benchmarks), settings)
    recorded = _read(responses, found)
    with GradingPool(seconds=settings.grading_seconds) as graders:
        reports = []
        for benchmark in found:
            answers = {problem.id: problem.answer for problem in benchmark.problems}
            graded = grade_all([answer for answer in recorded if answer.problem_id in answers], answers, graders)
            reports.append(build_report(0, benchmark.name, graded))
    out = out or Path(DEFAULT_OUT) / responses.stem
    finish(out, str(responses), reports, {"responses": str(responses)}, Progress(mode, steps=0))
    return reports


def _read(path: Path, benchmarks: Sequence[Benchmark]) -> list[Graded]:
    """The responses, not yet graded. UserError that names a line that is wrong, or a problem with too few."""
    known: dict[str, str] = {}
    for benchmark in benchmarks:
        for problem in benchmark.problems:
            if known.setdefault(problem.id, benchmark.name) != benchmark.name:
                raise UserError(
                    f"--benchmarks: {known[problem.id]} and {benchmark.name} both have a problem {problem.id!r}, and a "
                    "response names its problem alone: grade them one by one"
                )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--responses: {path} cannot be read ({error})") from error
    counts: Counter[str] = Counter()
    found: dict[tuple[str, int], Graded] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            answer = _answer(line, f"{path}:{number}", known, counts)
            key = answer.problem_id, answer.sample_index
            if key in found:
                raise UserError(f"{path}:{number}: sample {key[1]} of problem {key[0]!r} stands there twice")
            found[key] = answer
    most = max(counts.values(), default=0)
    if lacking := [id for id in sorted(known) if counts[id] != most] or ([] if found else ["any"]):
        raise UserError(
            f"{path}: problem {lacking[0]!r} has {counts[lacking[0]]} responses and others {most} ({len(lacking)} such "
            "problems); every problem needs equally many: add them, or leave problems out with evaluation.limit"
        )
    return list(found.values())


def _answer(line: str, where: str, known: Collection[str], counts: Counter[str]) -> Graded:
    try:
        values = json.loads(line)
        id, text = values["id"], values["response"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{where}: not an object with "id" and "response" ({error!r})') from error
    if not isinstance(text, str):
        raise UserError(f"{where}: response is a {type(text).__name__}, not text")
    id = str(id)
    if id not in known:
        raise UserError(f"{where}: no benchmark has a problem {id!r}")
    index = values.get("sample", counts[id])
    tokens, finished = values.get("num_tokens", 0), values.get("finished", True)
    if not (type(index) is int and type(tokens) is int and min(index, tokens) >= 0 and isinstance(finished, bool)):
        raise UserError(f"{where}: sample and num_tokens are whole numbers from 0, finished is true or false")
    counts[id] += 1
    return Graded(
        problem_id=id,
        sample_index=index,
        response_text=text,
        num_tokens=tokens,
        finished=finished,
        outcome="no_answer",
        extracted=None,
    )
