"""The answers of evaluations as the report shows them: a row of the list for each problem, and pages of answers."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_paint.evaluation.statistics import GREEDY, problem_scores
from megatron_paint.records import EvalReport, Graded
from megatron_paint.report.curves import is_number
from megatron_paint.report.samples import in_pages

COLUMNS = (
    "step",
    "benchmark",
    "id",
    "right",  # of `answers`
    "answers",
    "share",  # right / answers
    "greedy",  # whether the greedy answer is right; None: there is none
    "cut_off",  # number of answers
    "tokens",  # mean of the answers
    "change",  # of the share, from the first evaluation of the run on this benchmark
    "page",
    "place",
)
CHANGE = COLUMNS.index("change")


def answer_pages(report: EvalReport, step: int) -> Iterator[tuple[str, list[list[Any]], dict[str, Any]]]:
    """The pages of an evaluation: its key within the run, rows of COLUMNS without a change, and its content."""
    asked = {problem.id: problem for problem in report.problems}
    groups: dict[str, list[Graded]] = {id: [] for id in problem_scores(report)}
    for answer in report.answers:
        groups[answer.problem_id].append(answer)
    sized = [(item, sum(len(str(answer.response_text)) for answer in item[1])) for item in groups.items()]
    for part, page in enumerate(in_pages(sized)):
        key = f"e{step}_{part}"
        rows = [
            [step, str(report.benchmark), str(id), *_figures(answers), None, key, place]
            for place, (id, answers) in enumerate(page)
        ]
        entries = []
        for id, answers in page:
            texts = {"problem": str(asked[id].problem), "reference": str(asked[id].answer)} if id in asked else {}
            domain = str(answers[0].domain)
            entries.append({**texts, "domain": domain, "answers": [_answer(answer) for answer in answers]})
        yield key, rows, {"entries": entries, "tokens": {}}


def with_changes(rows: Sequence[list[Any]]) -> Iterator[list[Any]]:
    """The rows of all evaluations of a run, in the order of steps, with the change of the share."""
    share, first = COLUMNS.index("share"), {}
    for row in rows:
        before = first.setdefault((row[1], row[2]), row[share])
        yield [*row[:CHANGE], round(row[share] - before, 6), *row[CHANGE + 1 :]]


def _figures(answers: Sequence[Graded]) -> tuple[Any, ...]:
    """right, answers, share, greedy, cut_off and tokens of one problem."""
    sampled = [answer for answer in answers if answer.sample_index != GREEDY]
    greedy = [answer.outcome == "right" for answer in answers if answer.sample_index == GREEDY]
    right = sum(answer.outcome == "right" for answer in sampled)
    known = [tokens for answer in sampled if is_number(tokens := answer.num_tokens) and tokens]
    return (
        right,
        len(sampled),
        round(right / len(sampled), 6),
        greedy[0] if greedy else None,
        sum(answer.finished is False for answer in sampled),
        round(sum(known) / len(known)) if known else None,
    )


def _answer(answer: Graded) -> dict[str, Any]:
    return {
        "sample": answer.sample_index,  # -1: greedy
        "outcome": str(answer.outcome),
        "extracted": None if answer.extracted is None else str(answer.extracted),
        "tokens": answer.num_tokens if is_number(answer.num_tokens) else None,
        "finished": answer.finished,
        "text": str(answer.response_text),
        "error": str(answer.error),
    }
