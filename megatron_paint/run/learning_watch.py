"""Warns of training that teaches nothing, as the metrics of its steps show it.

Each sign has a number of steps in a row after which it is reported once, and is reported again at the end of the run.
A shorter run reports it at its end. The numbers of steps are ours: large enough that chance does not explain the sign,
small enough that little time is lost.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One sign that a run does not learn."""

    metric: str
    value: float  # the value of the metric in every one of these steps
    steps: int  # in a row
    text: str
    causes: tuple[str, ...]  # the likeliest first


SIGNS = (
    Sign(
        metric="reward/equal_groups_share",
        value=1.0,
        steps=5,
        text="every group had equal rewards, so no step changed a weight",
        causes=(
            "the problems are too hard for the model (reward/mean 0) or too easy (reward/mean 1): take other problems",
            "responses are cut off before their answer (response/truncated_share): raise rollout.max_new_tokens",
            "the groups are too small to differ: raise objective.grpo.samples_per_problem",
            "rollout.temperature is so low that the responses of a group are the same: raise it",
        ),
    ),
    Sign(
        metric="rollout/kept",
        value=0.0,
        steps=5,
        text="no response was trained on, so no step changed a weight",
        causes=(
            "no response is right (reward/mean 0): take easier problems, or train with objective.name=sft first",
            "responses are cut off before their answer (response/truncated_share): raise rollout.max_new_tokens",
            "too few responses are right for one to be shown another (reveal/without_peer): raise "
            "rollout.samples_per_problem",
        ),
    ),
    Sign(
        metric="response/truncated_share",
        value=1.0,
        steps=5,
        text="every response was cut off at rollout.max_new_tokens, so the student never learns to end",
        causes=(
            "rollout.max_new_tokens is too small for this model, which may think first: raise it, or set "
            "prompts.student_thinking=false",
            "the model does not know the end of a turn of its chat template, as base models: train it with "
            "objective.name=sft first, or set prompts.chat_template",
            "the responses repeat themselves: lower rollout.temperature, or go back to an earlier checkpoint",
        ),
    ),
    Sign(
        metric="response/no_answer_share",
        value=1.0,
        steps=5,
        text="no response had a final answer in \\boxed{}",
        causes=(
            "responses are cut off before their answer (response/truncated_share): raise rollout.max_new_tokens",
            "the prompt does not ask for a box: check prompts.student_template",
            "the model does not follow the prompt, as base models: train it with objective.name=sft first",
        ),
    ),
    Sign(
        metric="overlap/mean",
        value=0.0,
        steps=10,
        text="no response shared anything with its reference (objective.reveal.rule=overlap then shows all of it)",
        causes=(
            "the responses are empty, cut off or repeat themselves: look at the samples",
            "the solutions have no numbers, formulas or boxes to look for (anchors/none_share): take other solutions",
            "problems and solutions do not belong together: check data.columns",
            "objective.reveal.solution=wrong shows solutions of other problems: then this is as it should be",
        ),
    ),
)


class LearningWatch:
    """Follows the metrics of a run, step by step."""

    def __init__(self) -> None:
        self._in_a_row = dict.fromkeys(SIGNS, 0)
        self._reported: dict[Sign, tuple[int, int]] = {}  # first and last step of the longest row so far
        self._steps = 0  # that were not skipped

    def update(self, metrics: Mapping[str, Any]) -> list[str]:
        """Takes the metrics of the next step. Returns the warnings that are due at this step."""
        if "skipped" in metrics:
            return []
        self._steps += 1
        warnings = []
        for sign in SIGNS:
            value = metrics.get(sign.metric)  # None, or NaN, where the objective does not have it
            shows = value is not None and not math.isnan(value) and value == sign.value
            self._in_a_row[sign] = row = self._in_a_row[sign] + 1 if shows else 0
            if row < sign.steps:
                continue
            if sign not in self._reported:
                warnings.append(_warning(sign, f"in {row} steps in a row, up to step {metrics['step']},"))
            if row >= self._reported.get(sign, (0, 0))[0]:
                self._reported[sign] = (row, int(metrics["step"]))
        return warnings

    def summary(self) -> list[str]:
        """The warnings of the complete run, for its end."""
        found = []
        for sign in SIGNS:
            if self._steps and self._in_a_row[sign] == self._steps:
                found.append(_warning(sign, f"in all {self._steps} steps" if self._steps > 1 else "in the only step"))
            elif sign in self._reported:
                row, last = self._reported[sign]
                found.append(_warning(sign, f"in {row} steps in a row, up to step {last},"))
        return found


def _warning(sign: Sign, when: str) -> str:
    causes = "; ".join(f"({number}) {cause}" for number, cause in enumerate(sign.causes, start=1))
    return f"{when} {sign.text} ({sign.metric}={sign.value:g}). Likely causes: {causes}"
