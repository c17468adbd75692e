"""What a run prints about turns and thoughts: settings without effect, and solutions that do not fit the prompt."""

from collections.abc import Mapping, Sequence

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.config.settings import Settings
from megatron_paint.data import thoughts
from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.thoughts import THINK_END, THINK_START
from megatron_paint.records import Problem

AFTER = {
    "none": "every prompt ends without a thought",
    "open": f"every prompt ends in an open {THINK_START}",
    "closed": f"every prompt ends with a closed {THINK_START} block",
}


def turn_notes(prompts: Prompts) -> tuple[str, ...]:
    """Lines for the console about the end of responses, where it is unusual."""
    return tuple(f"turns      {note}" for note in prompts.tokenizer.notes)


def used_thinking_settings(settings: Settings) -> dict[str, bool]:
    """The thinking settings that a training run uses, by their key."""
    prompts, needs = settings.prompts, settings.needs
    used = {"prompts.student_thinking": prompts.student_thinking}
    if needs.masker and settings.objective.reveal.solution != "none":  # else the teacher has the student's prompt
        used["prompts.teacher_thinking"] = prompts.teacher_thinking
    if settings.evaluation.problems is not None:
        used["evaluation.thinking"] = settings.evaluation.thinking
    return used


def thinking_without_effect(prompts: Prompts, used: Mapping[str, bool]) -> tuple[str, ...]:
    """A note if the chat template renders the same prompt with and without thinking. used: settings by their key."""
    if prompts.thinking_has_effect:
        return ()
    state = thoughts.state_after(prompts.prompt_end(True))
    named = ", ".join(f"{key}={str(value).lower()}" for key, value in used.items())
    does = "do" if len(used) > 1 else "does"
    return (f"thinking   the chat template has no thinking switch, and {AFTER[state]}: {named} {does} nothing",)


def sft_warnings(settings: Settings, prompts: Prompts, problems: Sequence[Problem]) -> tuple[str, ...]:
    """Warnings of a run that trains on solutions, where their thoughts do not fit the end of the student's prompt."""
    tagged = sum(thoughts.has_tags(problem.solution) for problem in problems)
    total = len(problems)
    match thoughts.state_after(prompts.prompt_end(settings.prompts.student_thinking)):
        case "open" if tagged < total:
            switch = ", or set prompts.student_thinking=false" if prompts.thinking_has_effect else ""
            return (
                f"every prompt ends in an open {THINK_START}, and {total - tagged:,} of "
                f"{count_text(total, 'solution')} {agreeing(total - tagged, 'has', 'have')} no {THINK_END}: their "
                "responses close the thought first, so the model learns to answer without thinking. Write the thought "
                f"before the answer: {THINK_START}...{THINK_END}{switch}",
            )
        case "closed" if tagged:
            switch = "set prompts.student_thinking=true, or " if prompts.thinking_has_effect else ""
            return (
                f"every prompt ends with a closed {THINK_START} block, and {tagged:,} of "
                f"{count_text(total, 'solution')} {agreeing(tagged, 'brings its own', 'bring their own')}: the model "
                f"learns to think again after its thought has ended; {switch}remove the thoughts from the solutions",
            )
        case "none":
            stray = sum(
                problem.solution.partition(THINK_END)[0].find(THINK_START) < 0
                for problem in problems
                if THINK_END in problem.solution
            )
            if stray:
                return (
                    f"{stray:,} of {count_text(total, 'solution')} {agreeing(stray, 'contains', 'contain')} "
                    f"{THINK_END} without {THINK_START} before it, and the prompts open no thought: write "
                    f"{THINK_START} where the thought begins",
                )
    return ()
