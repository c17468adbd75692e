"""Makes the quickstart's checkpoint and problem files: `python tools/make_quickstart_model.py examples/quickstart`.

A Qwen3 of 0.3 million weights is warmed up, through the project's own policy and loss, until it has the skill and the
flaw that `quickstart_task.py` describes. Rounds of warm-up go on until the measured accuracies pass the gate, so that
every seed gives a model on which PAINT has something to teach. One process, no download.
"""

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from quickstart_task import SPECIAL, VOCABULARY, VOCABULARY_ROWS, RowMaker, draw_problems, write_problems, write_tokenizer

from megatron_paint.config import (
    DataSettings,
    EvaluationSettings,
    MegatronSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    PromptSettings,
    RolloutSettings,
    RunSettings,
    Settings,
)
from megatron_paint.errors import UserError
from megatron_paint.evaluation.evaluator import Evaluator
from megatron_paint.evaluation.grading import GradingPool
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.world import start_world, stop_world
from megatron_paint.objectives.losses import CrossEntropyLoss
from megatron_paint.prompts import Prompts
from megatron_paint.qwen3 import read_shape
from megatron_paint.records import Problem, Sample, TokenIds
from megatron_paint.tokenizers import load_tokenizer

TEMPLATES = Path(__file__).parents[1] / "examples" / "quickstart" / "templates"
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 2000, 240
PROBLEM_SEED = 7  # the problem files do not depend on --seed
MEASURED_PROBLEMS = 150
PEAK_LR = 4.0e-3
DRILLS = 256  # rows in a step of drills
DRILLED_LOSS = 0.02  # nats a token; below it the table of sums is known
MIXTURE = {"plain": 32, "reference": 56, "foreign": 16, "drill": 32}  # rows in a step of a round
ROUND_STEPS = 300
MOST_DRILL_STEPS, MOST_ROUNDS = 2000, 12
SHARES = (1.0, 0.65, 0.3)  # of the reference, at which the model is measured as teacher


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Percent of answers that are right on held-out problems, sampled at temperature 1 unless said otherwise."""

    alone: float
    greedy: float
    with_reference: dict[float, float]  # by the share that is shown
    with_foreign: float  # shown another problem's solution

    @property
    def passes(self) -> bool:
        """Room to learn, a teacher that is worth it, and no help from a reference that is not the problem's."""
        return 30 <= self.alone <= 60 and min(self.with_reference.values()) > 88 and self.with_foreign < 60

    def __str__(self) -> str:
        shown = ", ".join(f"{share:g}: {percent:.1f}" for share, percent in self.with_reference.items())
        return (
            f"alone {self.alone:.1f} % (greedy {self.greedy:.1f}); with a share of the reference {shown}; "
            f"with another problem's {self.with_foreign:.1f}"
        )


class ReferencePrompts:
    """Prompts of an evaluation that show a share of a solution, the problem's own or the next one's."""

    def __init__(self, rows: RowMaker, problems: list[Problem], *, share: float, foreign: bool = False):
        self.rows, self.share = rows, share
        self.tokenizer, self.response_text = rows.prompts.tokenizer, rows.prompts.response_text
        shown = problems[1:] + problems[:1] if foreign else problems
        self.solution_of = {problem.id: other.solution for problem, other in zip(problems, shown, strict=True)}

    def evaluation_prompt(self, problem: Problem, thinking: bool) -> TokenIds:
        return self.rows.reference_prompt(problem, self.solution_of[problem.id], self.share)


class WarmUp:
    """A policy in the making, with the rows it learns from and the problems it is measured on."""

    def __init__(self, policy: MegatronPolicy, rows: RowMaker, held_out: list[Problem], graders: GradingPool):
        self.policy, self.rows, self.graders = policy, rows, graders
        self.held_out = held_out[:MEASURED_PROBLEMS]
        self.loss = CrossEntropyLoss(chunk_bytes=1.0e9)
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", flush=True)

    def update(self, samples: list[Sample], *, lr: float) -> list[float]:
        """One step; the loss of each sample in nats a token."""
        report = self.policy.update(samples, self.loss, lr=lr)
        return [score.loss_sum / score.num_tokens for score in report.scores]

    def drill(self) -> None:
        """Single steps until the table of sums is known; UserError where it stays unknown."""
        average = math.log(10)
        for step in range(1, MOST_DRILL_STEPS + 1):
            losses = self.update([self.rows.drill() for _ in range(DRILLS)], lr=PEAK_LR * min(1, step / 30))
            average += 0.1 * (sum(losses) / len(losses) - average)
            if step % 50 == 0:
                self.say(f"drill {step}: loss {average:.3f}")
            if average < DRILLED_LOSS:
                return self.say(f"drill {step}: loss {average:.3f}, the table is known")
        raise UserError(f"the drills ended at {average:.3f} nats a token, above {DRILLED_LOSS}; try another --seed")

    def mixture_round(self, number: int) -> Accuracy:
        """One round over all kinds of rows, its learning rate falling to a twentieth; what the model can do then."""
        kinds = [kind for kind, count in MIXTURE.items() for _ in range(count)]
        peak = PEAK_LR if number == 1 else PEAK_LR / 2
        for step in range(1, ROUND_STEPS + 1):
            lr = peak * min(1, step / 30) * (0.525 + 0.475 * math.cos(math.pi * step / ROUND_STEPS))
            losses = self.update([getattr(self.rows, kind)() for kind in kinds], lr=lr)
            if step % 50 == 0:
                self.say(f"round {number}, step {step}: loss {_by_kind(kinds, losses)}")
        accuracy = self.measure()
        self.say(f"round {number}: {accuracy}")
        return accuracy

    def measure(self) -> Accuracy:
        """Accuracy on held-out problems under every kind of prompt."""
        alone = self._evaluate(self.rows.prompts, greedy=True)
        return Accuracy(
            alone=alone["avg"],
            greedy=alone["greedy"],
            with_reference={share: self._with_reference(share=share) for share in SHARES},
            with_foreign=self._with_reference(share=1.0, foreign=True),
        )

    def _with_reference(self, *, share: float, foreign: bool = False) -> float:
        return self._evaluate(ReferencePrompts(self.rows, self.held_out, share=share, foreign=foreign))["avg"]

    def _evaluate(self, prompts: Prompts | ReferencePrompts, *, greedy: bool = False) -> dict[str, float]:
        settings = EvaluationSettings(samples=2, top_p=1.0, max_new_tokens=48, greedy=greedy)
        evaluator = Evaluator(settings, self.held_out, prompts, seed=1)
        return evaluator.evaluate(self.policy, step=0, benchmark="held_out", graders=self.graders).metrics
