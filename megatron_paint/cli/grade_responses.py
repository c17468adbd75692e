"""Grades recorded responses: of another program, or of an evaluation without grades.

Each line of the file is a JSON object with `id` (of the problem) and `response` (text). Optional are `sample` (default:
the order of the lines of a problem), `finished` (default: true) and `num_tokens`. The file has no prompts. If no
response contains <think>, and more than half of the finished ones contain </think>, the prompts are assumed to end with
<think>: then a response without </think> is an unfinished thought.
"""

import argparse
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate_model import finish, print_notes
from megatron_paint.cli.evaluate_options import DEFAULT_OUT
from megatron_paint.cli.ranks import console_mode
from megatron_paint.config.load import domains_of, evaluation_section_of, grading_section_of, override_tree
from megatron_paint.data.rows import kind_of
from megatron_paint.evaluation.benchmarks import Benchmark, load_benchmarks, names_in
from megatron_paint.evaluation.evaluator import grade_all
from megatron_paint.evaluation.statistics import build_report
from megatron_paint.grading.grade import Rules
from megatron_paint.grading.graders import Graders
from megatron_paint.grading.thoughts import THINK_END, THINK_START, ends_unbegun_thought, opened_by_prompt
from megatron_paint.records import EvalReport, Graded
from megatron_paint.run.console import Mode, Progress


def run(options: argparse.Namespace) -> int:
    """`megatron-paint evaluate --responses FILE`; returns the exit status."""
    for name, value in (("--model", options.model), ("--n", options.samples), ("SETTINGS.yaml", options.config)):
        if value is not None:
            raise UserError(f"{name} samples new answers, and --responses grades recorded ones: leave one of them out")
    if options.benchmarks is None:
        raise UserError("--responses needs --benchmarks: the problems with the right answers")
    mode = console_mode(options)
    grade_recorded(options.responses, options.benchmarks, options.out, overrides=options.overrides, mode=mode)
    return 0


def grade_recorded(
    responses: Path, benchmarks: str, out: Path | None, *, overrides: Sequence[str], mode: Mode
) -> list[EvalReport]:
    """Writes and prints reports of recorded responses. Every problem needs the same number of responses."""
    tree = override_tree({}, overrides)
    settings = evaluation_section_of(tree)
    rules = Rules(box_in_thought=grading_section_of(tree).box_in_thought)
    domains = domains_of(tree)
    progress = Progress(mode, steps=0)
    found = load_benchmarks(names_in(benchmarks), settings, domains=domains)
    print_notes(found, progress)
    recorded = _read(responses, found)
    prompt_end = _assumed_prompt_end(recorded, progress)
    with Graders(domains, seconds=settings.grading_seconds, rules=rules) as graders:
        graders.check(problem for benchmark in found for problem in benchmark.problems)
        reports = []
        for benchmark in found:
            problems = {problem.id: problem for problem in benchmark.problems}
            ungraded = [answer for answer in recorded if answer.problem_id in problems]
            graded = grade_all(ungraded, problems, graders, prompt_ends=[prompt_end] * len(ungraded))
            reports.append(build_report(0, benchmark.name, graded))
    out = out or Path(DEFAULT_OUT) / responses.stem
    finish(out, str(responses), reports, {"responses": str(responses)}, progress)
    return reports


def _assumed_prompt_end(recorded: Sequence[Graded], progress: Progress) -> str:
    """Returns <think> if the prompts probably ended with it. Warns if a response ends a thought that it never began."""
    texts = [answer.response_text for answer in recorded]
    opened = opened_by_prompt([(answer.response_text, answer.finished) for answer in recorded])
    if unbegun := sum(map(ends_unbegun_thought, texts)):
        begun = sum(THINK_START in text for text in texts)
        progress.warn(
            f"{unbegun:,} of {count_text(len(texts), 'response')} "
            f"{agreeing(unbegun, 'ends a thought that it', 'end a thought that they')} never began ({THINK_END} "
            f"without {THINK_START} before it), and {begun} {agreeing(begun, 'contains', 'contain')} {THINK_START}. "
            + (
                f"So the prompts are assumed to end with {THINK_START}: a response without {THINK_END} is an "
                "unfinished thought"
                if opened
                else "The prompts are assumed not to begin a thought: a response begins its thought itself or has none"
            )
        )
    return THINK_START if opened else ""


def _read(path: Path, benchmarks: Sequence[Benchmark]) -> list[Graded]:
    """The responses, without grades. UserError names a wrong line, or a problem with too few responses."""
    known: dict[str, str] = {}
    for benchmark in benchmarks:
        for problem in benchmark.problems:
            if known.setdefault(problem.id, benchmark.name) != benchmark.name:
                raise UserError(
                    f"--benchmarks: {known[problem.id]} and {benchmark.name} both have a problem {problem.id!r}, and a "
                    "response names only its problem: grade the benchmarks one by one"
                )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--responses: {path} cannot be read ({error})") from error
    counts: Counter[str] = Counter()
    found: dict[tuple[str, int], Graded] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            answer = _answer(line, f"{path}:{number}", known, counts)
            key = answer.problem_id, answer.sample_index
            if key in found:
                raise UserError(f"{path}:{number}: sample {key[1]} of problem {key[0]!r} is in the file twice")
            found[key] = answer
    if not found:
        raise UserError(f"--responses: {path} has no responses")
    most = max(counts.values())
    if short := [id for id in sorted(known) if counts[id] != most]:
        raise UserError(
            f"{path}: problem {short[0]!r} has {count_text(counts[short[0]], 'response')} and others {most} "
            f"({count_text(len(short), 'such problem')}); every problem needs the same number: add responses, or use "
            "fewer problems (evaluation.limit)"
        )
    return list(found.values())


def _answer(line: str, where: str, known: Collection[str], counts: Counter[str]) -> Graded:
    try:
        values = json.loads(line)
        id, text = values["id"], values["response"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{where}: not an object with "id" and "response" ({error!r})') from error
    if not isinstance(text, str):
        raise UserError(f"{where}: response is {kind_of(text)}, not text")
    id = str(int(id) if isinstance(id, float) and id.is_integer() else id)
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
