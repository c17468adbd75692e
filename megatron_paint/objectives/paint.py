"""PAINT, one step from problems to update (arXiv 2604.26573); OPSD (arXiv 2601.18734) is its special case.

The student samples one response per problem. The more of the reference a response reproduces, the more of the reference
is hidden from the teacher, which is the same network. The teacher scores the response again; the student moves towards
the teacher's distribution, mixed with its own where their entropies differ most. OPSD shows everything and mixes
nothing. With several responses per problem, their grades may decide which ones are trained on (`rollout.keep`) and
which one the teacher is shown in place of the solution (`reveal.solution: peer_rollout`).
"""

import dataclasses
from collections.abc import Sequence

from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.grading.grade import Grade
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.masker.reveal import Peer, limit_hidden, reveal_step
from megatron_paint.objectives.graded import (
    grade_rollouts,
    grader_warnings,
    reward_metrics,
    scores_of_all,
    verdicts_of,
)
from megatron_paint.objectives.interface import ObjectiveInputs
from megatron_paint.policy import Policy, ScoredSequence
from megatron_paint.records import Problem, Reveal, Rollout, Sample, StepResult
from megatron_paint.rollouts.outcomes import Outcome, outcome_metrics, outcomes_of
from megatron_paint.rollouts.source import sample_key
from megatron_paint.runtime.timer import Timer

PEER_SEAMS = 16  # ours: most tokens that a shown response can add where its text meets the template's


class Paint:
    """The objective of `objective.name: paint` and `opsd`."""

    def __init__(self, inputs: ObjectiveInputs):
        settings = inputs.settings
        self.settings = settings.reveal
        self.prompts = inputs.prompts
        self.rollouts = inputs.rollouts
        self.masker = inputs.masker
        self.grades_rollouts, self.graders = inputs.grades_rollouts, inputs.graders
        self.shows_peers = settings.reveal.solution == "peer_rollout"
        self.domains = inputs.domains
        self.on_rank_zero = inputs.on_rank_zero
        # Greedy log-probabilities are taken at temperature 1.
        self.loss = DistillationLoss(
            config=settings.loss,
            chunk_bytes=settings.chunk_bytes,
            kernel=loss_kernel(settings.kernel),
            token_temperature=inputs.rollouts.sampling.temperature or 1.0,
            importance_limit=inputs.rollouts.importance_limit,
        )

    def step(self, policy: Policy, problems: Sequence[Problem], *, step: int, lr: float, timer: Timer) -> StepResult:
        """Samples, masks, scores and updates once; without a response to train on it updates nothing."""
        with timer("rollout"):
            rollouts = self.rollouts.rollouts(problems, step=step)
        problems = [problem for problem in problems for _ in range(self.rollouts.samples)]  # one for each response
        grades = self.grades(problems, rollouts, timer)
        outcomes = self.outcomes(rollouts, grades)
        taught = [index for index, outcome in enumerate(outcomes) if outcome.left_out is None]
        with timer("mask"):
            reveals = self.reveals(problems, rollouts, outcomes, step=step)
        with timer("teacher"):
            reveals = self.limit_hidden(policy, problems, reveals)
        samples = self.samples(problems, rollouts, reveals, outcomes, step=step)
        update = policy.update([samples[index] for index in taught], self.loss, lr=lr) if taught else None
        return StepResult(
            samples=samples,
            scores=scores_of_all(samples, taught, update.scores if update else ()),
            updates=(update,) if update else (),
            extras=self.extras(rollouts, grades, outcomes),
            warnings=grader_warnings(rollouts, grades, step=step) if grades else (),
            verdicts=verdicts_of(rollouts, grades) if grades else {},
        )

    def grades(self, problems: Sequence[Problem], rollouts: Sequence[Rollout], timer: Timer) -> list[Grade]:
        """Verdicts in the order of the rollouts, if a rule keeps some of them or the order of problems needs them."""
        if not self.grades_rollouts:
            return []
        with timer("grade"):
            return grade_rollouts(
                problems, rollouts, prompts=self.prompts, graders=self.graders, on_rank_zero=self.on_rank_zero
            )

    def outcomes(self, rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> list[Outcome]:
        """Which responses are trained on, and which response each teacher is shown. grades: empty without grading."""
        if not grades:
            return [Outcome()] * len(rollouts)
        return outcomes_of(
            rollouts,
            [grade.correct for grade in grades],
            keep=self.rollouts.keep,
            peers=self.shows_peers,
            may_be_shown=self.may_be_shown,
        )

    def extras(
        self, rollouts: Sequence[Rollout], grades: Sequence[Grade], outcomes: Sequence[Outcome]
    ) -> dict[str, float]:
        """The metrics of grades and of what follows from them."""
        if not grades:
            return {}
        chooses = self.rollouts.keep != "all" or self.shows_peers
        counts = outcome_metrics(outcomes, rollouts, peers=self.shows_peers) if chooses else {}
        return {**reward_metrics(grades), **counts}

    def may_be_shown(self, rollout: Rollout) -> bool:
        """Whether a response has text, and not more tokens as text than `longest_prompt` counts."""
        text = self.prompts.response_text(rollout.response_ids)
        return bool(text.strip()) and self.prompts.shown_size(text) <= self.rollouts.sampling.max_new_tokens

    def reveals(
        self,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        outcomes: Sequence[Outcome],
        *,
        step: int,
    ) -> list[Reveal | None]:
        """How much of each reference the masker shows the teacher; None for a response that is left out.

        Partners of a complete step (`wrong`, `other_example`, `shuffled`) do not depend on which responses are kept.
        """
        text = self.prompts.response_text
        # A response without a peer has no reference. Peers pair no problems, so they need no complete step.
        measured = [i for i, outcome in enumerate(outcomes) if outcome.peer is not None or not self.shows_peers]
        peers = [Peer(text(o.peer.response_ids), o.peer.sample_index) for o in outcomes if o.peer is not None]
        found = self.on_rank_zero(
            lambda: reveal_step(
                [problems[index] for index in measured],
                [text(rollouts[index].response_ids) for index in measured],
                settings=self.settings,
                keys=[self._key(problems[index], rollouts[index], step) for index in measured],
                token_offsets=self.prompts.solution_offsets,
                peers=peers if self.shows_peers else None,
                pool=self.masker,
                domains=self.domains,
            )
        )
        reveals = dict(zip(measured, found, strict=True))
        return [reveals[i] if outcome.left_out is None else None for i, outcome in enumerate(outcomes)]

    def limit_hidden(
        self, policy: Policy, problems: Sequence[Problem], reveals: list[Reveal | None]
    ) -> list[Reveal | None]:
        """Shows more of a solution where its hidden part surprises the teacher by more than `reveal.hidden_nats`.

        Costs one more pass without gradient: the teacher scores the references that are partly hidden.
        """
        if self.settings.hidden_nats is None:
            return reveals
        partly = [i for i, reveal in enumerate(reveals) if reveal and reveal.shown_tokens < reveal.total_tokens]
        references = [
            ScoredSequence(
                prompt_ids=self.prompts.teacher_prompt(problems[index], reveals[index]),
                response_ids=self.prompts.solution_ids(reveals[index].reference),
            )
            for index in partly
        ]
        limited = list(reveals)
        scored = policy.logprobs(references, weights="teacher") if partly else []
        for index, logprobs in zip(partly, scored, strict=True):
            surprise = [-logprob for logprob in logprobs]
            offsets = self.prompts.solution_offsets(reveals[index].reference)
            limited[index] = limit_hidden(reveals[index], surprise, settings=self.settings, offsets=offsets)
        return limited

    def samples(
        self,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        reveals: Sequence[Reveal | None],
        outcomes: Sequence[Outcome],
        *,
        step: int,
    ) -> tuple[Sample, ...]:
        """Each rollout with what the teacher is shown for it; one that is left out has no teacher."""
        samples = []
        for problem, rollout, reveal, outcome in zip(problems, rollouts, reveals, outcomes, strict=True):
            full = reveal is not None and self.loss.needs_full_teacher
            samples.append(
                Sample(
                    problem=problem,
                    key=self._key(problem, rollout, step),
                    rollout=rollout,
                    teacher_prompt_ids=None if reveal is None else self.prompts.teacher_prompt(problem, reveal),
                    full_teacher_prompt_ids=self.prompts.full_teacher_prompt(problem, reveal) if full else None,
                    reveal=reveal,
                    old_logprobs=rollout.logprobs if rollout.is_behind else None,
                    correct=outcome.correct,
                    left_out=outcome.left_out,
                )
            )
        return tuple(samples)

    def _key(self, problem: Problem, rollout: Rollout, step: int) -> int:
        return sample_key(self.rollouts.seed, step=step, problem=problem, index=rollout.sample_index)

    @staticmethod
    def longest_prompt(problem: Problem, prompts: Prompts, settings: ObjectiveSettings, *, response: int) -> int:
        """Tokens of the teacher's prompt with almost all of the reference and the line that the rest is hidden.

        With `hidden_nats` the teacher also scores the reference after that prompt, which may be longer than a response.
        A shown response is not counted here (`Needs.shown_responses`), nor is a worked example, which is another
        problem's (`check_partners` in training/partners.py).
        """
        match settings.reveal.solution:
            case "other_example":
                return len(prompts.student_prompt(problem))
            case "reference_free":
                return max(len(prompts.student_prompt(problem)), len(prompts.problem_alone(problem)))
            case "peer_rollout":
                bare = dataclasses.replace(problem, solution="", view="")
                return prompts.longest_prompt(bare) + PEER_SEAMS * prompts.times_shown
        scored = 0 if settings.reveal.hidden_nats is None else len(prompts.solution_offsets(problem.reference))
        return prompts.longest_prompt(problem) + max(0, scored - response)
