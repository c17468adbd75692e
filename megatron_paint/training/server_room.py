"""Whether vLLM servers take every prompt of a run with its response: known before the first step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.data.prompts import Prompts
from megatron_paint.evaluation.evaluator import Evaluator
from megatron_paint.records import Problem, TokenIds

if TYPE_CHECKING:
    from megatron_paint.rollouts.vllm.fleet import Fleet


def check_room_for_rollouts(fleet: "Fleet", problems: Sequence[Problem], prompts: Prompts, *, most_new: int) -> None:
    """UserError: the student's prompt of a problem and its response are too long for a server that is ready."""
    _check(fleet, problems, prompts.student_prompt, response=most_new, setting="rollout.max_new_tokens")


def check_room_for_answers(fleet: "Fleet", evaluator: Evaluator) -> None:
    """UserError: the prompt of an evaluation and its answer are too long for a server that is ready."""
    response = evaluator.settings.longest_answer
    _check(fleet, evaluator.problems, evaluator.prompt, response=response, setting="evaluation.max_new_tokens")


def _check(
    fleet: "Fleet", problems: Sequence[Problem], prompt: Callable[[Problem], TokenIds], *, response: int, setting: str
) -> None:
    longest = fleet.longest
    too_long: list[tuple[int, Problem]] = []
    if problems and longest is not None:
        template = len(prompt(replace(problems[0], problem="")))
        # A text has no more tokens than bytes: few prompts are counted.
        unsure = [p for p in problems if template + len(p.problem.encode()) + response > longest]
        too_long = [(size, p) for p in unsure if (size := len(prompt(p))) + response > longest]
    if not too_long:
        return
    size, problem = max(too_long, key=lambda one: one[0])
    shorter = f"lower {setting} to {longest - size} or less, or " if longest > size else ""
    raise UserError(
        f"the vLLM servers have no room for {len(too_long):,} of {count_text(len(problems), 'prompt')} and their "
        f"responses: the longest prompt, of {problem.source or problem.id}, has {count_text(size, 'token')}, {setting} "
        f"is {response}, and a server takes {longest}; raise that to {size + response} (rollout.vllm.max_model_len, "
        f"--max-model-len), {shorter}leave such problems out"
    )
