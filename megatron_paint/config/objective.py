"""The settings of an objective: what the teacher sees and is, and what each objective needs of a run."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_paint.config.dialect import (
    OASIS,
    OP2SD,
    OPSD,
    OPSD_GRPO,
    PAINT,
    Count,
    Flag,
    Number,
    Positive,
    Text,
    Whole,
    setting,
    settings_class,
)
from megatron_paint.config.loss import InterpolationLossConfig, Kernel

# Values of objective.reveal.solution with which nothing that the teacher could see is hidden.
SHOWN_WHOLE = ("none", "reference_free", "other_example")


@settings_class
class RevealSettings:
    """How much of the solution the teacher sees."""

    rule: Annotated[
        Literal["overlap", "full", "fixed", "random", "shuffled", "inverted"],
        setting(
            "how the shown share is chosen; overlap: the more of the solution a response has, the less is shown; full: "
            "everything is shown (OPSD); fixed: always objective.reveal.share; random: drawn between minimum and 1; "
            "shuffled: the share of another problem's response; inverted: the more a response has, the more is shown",
            source=f"{PAINT}; the linear map is ours",
        ),
    ] = "overlap"
    minimum: Annotated[
        Number, setting("r_min: share that is shown for a response with every anchor of the solution", ge=0, le=1)
    ] = 0.3
    share: Annotated[Number | None, setting("share that is shown with rule=fixed", ge=0, le=1)] = None
    unit: Annotated[Literal["token", "segment"], setting("unit in which the share is counted")] = "token"
    hidden_nats: Annotated[
        Positive | None,
        setting(
            "limit on the teacher's surprise at the hidden tokens, in nats; above it more is shown; null: no limit"
        ),
    ] = None
    hide_answer: Annotated[Flag, setting("hide the last box even where the share would show it")] = False
    solution: Annotated[
        Literal["own", "wrong", "none", "reference_free", "other_example", "peer_rollout"],
        setting(
            "own: the problem's solution; wrong: that of another problem of the step; none: the teacher sees the "
            "student's prompt; reference_free: the student's message in the teacher's thinking mode; other_example: "
            "another problem of the step with its complete solution, as a worked example; peer_rollout: the shortest "
            "other right response to the problem",
            source=f"ours; other_example: {OP2SD}; peer_rollout: {OASIS}",
        ),
    ] = "own"
    view: Annotated[
        Text,
        setting(
            "which text of a problem is its reference; full: the solution; answer: the boxed answer alone; any other "
            "name: that column of data.columns.views"
        ),
    ] = "full"
    anchors: Annotated[
        Text, setting("anchor extractor of the domains that name none of their own: math, code or text")
    ] = "math"

    @property
    def needs_solutions(self) -> bool:
        """Whether a problem without a solution cannot be used."""
        return self.view == "full" and self.solution != "peer_rollout"

    @property
    def shows_all(self) -> bool:
        """Whether nothing is ever hidden from the teacher."""
        everything = self.rule == "full" or (self.rule == "fixed" and self.share == 1.0)
        return self.solution in SHOWN_WHOLE or (everything and not self.hide_answer)


@settings_class
class TeacherSettings:
    """The weights that score as teacher. With GRPO they are the reference of the KL."""

    weights: Annotated[
        Literal["initial", "current", "ema"],
        setting("the teacher's weights: those of the start, the student's, or a moving average", source=OPSD),
    ] = "initial"
    ema_decay: Annotated[
        Number, setting("decay of the moving average after each optimiser step", source=OPSD, ge=0, lt=1)
    ] = 0.999
    ema_anchor: Annotated[
        Number,
        setting(
            "each step moves the average towards (1 - ema_anchor) x student + ema_anchor x initial weights", ge=0, le=1
        ),
    ] = 0.0
    offload: Annotated[Flag, setting("keep the second set of weights in host memory between passes")] = False


@settings_class
class GrpoSettings:
    """Group relative policy optimisation (arXiv 2402.03300)."""

    samples_per_problem: Annotated[
        Whole, setting("responses in a group; another name of rollout.samples_per_problem", source=OPSD_GRPO, ge=2)
    ] = 8
    updates_per_batch: Annotated[Count, setting("optimiser steps on the responses of one step")] = 1
    clip_low: Annotated[
        Number, setting("the ratio is clipped below 1 - clip_low", source="the usual value of PPO", ge=0, lt=1)
    ] = 0.2
    clip_high: Annotated[
        Number, setting("the ratio is clipped above 1 + clip_high", source="the usual value of PPO", ge=0)
    ] = 0.2
    normalisation: Annotated[
        Literal["token_mean", "sequence_mean"],
        setting(
            "token_mean: mean over all tokens that carry loss; sequence_mean: each response's mean, then the mean over "
            "responses"
        ),
    ] = "token_mean"
    kl_weight: Annotated[
        Number, setting("weight of the KL to the weights of objective.teacher (estimator k3)", source=OPSD_GRPO, ge=0)
    ] = 0.0
    importance_limit: Annotated[
        Positive | None,
        setting(
            "largest importance weight of a token; the weight corrects for the difference between sampler and trainer; "
            "null: no weights"
        ),
    ] = 2.0


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective needs of a run."""

    samples_per_problem: int  # rollouts of each problem in a step; 0: the solution is trained on
    teacher: bool = False  # a pass with the weights of `objective.teacher`
    initial: bool = False  # a pass with the initial weights and the student's prompt
    masker: bool = False  # overlap and reveal
    graders: bool = False  # verdicts on rollouts
    shown_responses: int = 0  # responses that the longest prompt holds: a teacher may be shown one
    solutions: bool = True  # a solution of each problem
    weighs_older: bool = False  # it can learn from responses of older weights: it passes on their log-probabilities


@settings_class
class ObjectiveSettings:
    """The training objective."""

    name: Annotated[
        Literal["paint", "opsd", "grpo", "sft"],
        setting(
            "paint, opsd: distillation from a teacher that sees the solution; grpo: reinforcement learning from "
            "verified answers; sft: training on the solutions"
        ),
    ] = "paint"
    reveal: RevealSettings = field(default_factory=RevealSettings)
    loss: InterpolationLossConfig = field(default_factory=InterpolationLossConfig)
    chunk_bytes: Annotated[Positive, setting("bytes of logits that the loss may hold at once")] = 1.0e9
    kernel: Annotated[
        Kernel,
        setting("implementation of the loss's elementwise work; auto: torch where CUDA or Triton is missing"),
    ] = "auto"
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)

    @property
    def needs(self) -> Needs:
        """What the objective of this name needs. `Settings.needs` adds what the section rollout asks for."""
        match self.name:
            case "paint" | "opsd":
                peers = self.reveal.solution == "peer_rollout"
                return Needs(
                    samples_per_problem=1,
                    teacher=True,
                    masker=True,
                    initial=self.loss.needs_initial,
                    graders=peers,
                    shown_responses=int(peers),
                    solutions=self.reveal.needs_solutions,
                    weighs_older=True,
                )
            case "grpo":
                group = self.grpo.samples_per_problem
                return Needs(
                    samples_per_problem=group,
                    teacher=self.grpo.kl_weight > 0,
                    graders=True,
                    solutions=False,
                    weighs_older=True,
                )
            case "sft":
                return Needs(samples_per_problem=0)
