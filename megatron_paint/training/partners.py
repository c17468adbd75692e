"""Room for prompts that hold a text of another problem, checked before a run: which problems meet is drawn later."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_paint.base.errors import UserError
from megatron_paint.data.problems import ProblemSet
from megatron_paint.data.prompt_limit import PromptLimit
from megatron_paint.data.prompts import Prompts
from megatron_paint.records import Problem


def check_partners(
    problems: ProblemSet, solution: str, *, prompts: Prompts, limit: PromptLimit, steps: int, order: str = "shuffled"
) -> None:
    """Raises UserError if `objective.reveal.solution` pairs problems of a step that do not fit or do not exist.

    solution: the value of that setting; most of them pair nothing. limit: of the prompts with a problem's own texts.
    steps: how many steps the run has. order: data.order.
    """
    if solution == "wrong":
        _check_wrong_solutions(problems.problems, limit)
    if solution == "other_example":
        _check_steps(problems, steps, order)
        _check_room(_longest_with_example(problems.problems, prompts), solution, limit)


def _check_wrong_solutions(problems: Sequence[Problem], limit: PromptLimit) -> None:
    """Raises UserError if the longest problem does not fit with another one's reference."""
    longest = max(problems, key=lambda problem: len(problem.problem))
    other = max(problems, key=lambda problem: len(problem.reference))
    length = limit.length(dataclasses.replace(longest, solution=other.solution, view=other.view))
    _check_room(length, "wrong", limit)


def _check_room(length: int, solution: str, limit: PromptLimit) -> None:
    if length <= limit.most:
        return
    lowered = f"{limit.setting} to at most {limit.row_tokens - length}" if length < limit.row_tokens else ""
    changes = [f"set {change}, " for change in (lowered, limit.raised_text(length + limit.response)) if change]
    advice = f"{''.join(changes)}{'or ' * bool(changes)}leave the longest problems or solutions out"
    raise UserError(
        f"objective.reveal.solution={solution} can make a prompt of {length} tokens before the {limit.response} of "
        f"{limit.setting}, and {limit.positions_text}: {advice}"
    )


def _check_steps(problems: ProblemSet, steps: int, order: str) -> None:
    """Raises UserError for a step without two different problems: one is the worked example of the other."""
    texts = Counter(" ".join(problem.problem.split()) for problem in problems.problems)
    if problems.problems_per_step > max(texts.values()):
        return
    if order == "adastar":
        raise UserError(
            "objective.reveal.solution=other_example takes another problem of the same step, and with data.order="
            f"{order} any problems may meet: {max(texts.values())} have the same text; "
            "set data.problems_per_step to at least "
            f"{max(texts.values()) + 1}, or leave such problems out"
        )
    for step in range(1, steps + 1):
        batch = problems.batch(step)
        if len({" ".join(problem.problem.split()) for problem in batch}) < 2:
            raise UserError(
                f"objective.reveal.solution=other_example takes another problem of the same step, and step {step} has "
                f"only {batch[0].source or batch[0].id}; set data.problems_per_step to 2 or more, and leave problems "
                "with the same text out"
            )


def _longest_with_example(problems: Sequence[Problem], prompts: Prompts) -> int:
    """Returns the tokens of the longest problem's prompt with the longest worked example."""

    def tokens(text: str) -> int:
        return len(prompts.solution_ids(text))

    longest = _longest(problems, lambda one: one.problem, tokens)
    example = _longest(problems, lambda one: f"{one.problem}\n{one.reference}", tokens)
    return len(prompts.example_prompt(longest, example=example.problem, solution=example.reference))


def _longest(problems: Sequence[Problem], text: Callable[[Problem], str], tokens: Callable[[str], int]) -> Problem:
    """Returns the problem whose text has the most tokens. A text has no more tokens than bytes: few are counted."""
    sized = sorted(((len(text(problem).encode()), place) for place, problem in enumerate(problems)), reverse=True)
    best, most = problems[0], -1
    for size, place in sized:
        if size <= most:
            break
        if (count := tokens(text(problems[place]))) > most:
            best, most = problems[place], count
    return best
