"""The records of a training step, in the order in which they appear.

Problem -> Rollout -> Reveal -> Sample -> SampleScore -> StepReport. An evaluation makes Graded and EvalReport.
All records are frozen: a step makes new records and never changes one. Token ids are tuples of int. Text becomes token
ids once.
"""

from dataclasses import dataclass, field
from typing import Literal

TokenIds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem with its verified worked solution."""

    id: str  # unique in its file
    problem: str  # the problem's text
    solution: str  # the verified solution; ends in \boxed{answer} in the usual data sets
    answer: str  # the final answer that the grader compares with
    source: str = ""  # where it was read: "file:line"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response that the student sampled for one problem."""

    problem_id: str
    sample_index: int  # 0 .. samples per problem - 1
    prompt_ids: TokenIds  # the student's prompt
    response_ids: TokenIds  # the sampled tokens, including the end token if one was sampled
    # Log-probs of the sampled tokens, in nats, at the sampling temperature, before top-k and top-p. None from a replay.
    logprobs: tuple[float, ...] | None
    finished: bool  # True: a stop token ended it; False: it was cut at the length limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """A piece of the reference that a rollout can reproduce."""

    kind: Literal["boxed", "formula", "number"]
    text: str  # normalised
    found: bool  # the rollout contains it


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How much of a reference a rollout reproduces."""

    score: float  # found anchors / all anchors, in [0, 1]; 0 without anchors
    anchors: tuple[Anchor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reveal:
    """How much of the reference the teacher is shown for one rollout."""

    overlap: Overlap
    share: float  # requested by the rule, in [0, 1]; under the rule `overlap` it falls as the overlap rises
    shown_tokens: int  # after the cut was moved back to a boundary
    total_tokens: int  # of the reference
    shown_text: str  # a prefix of the reference, or the complete reference
    reference: str  # the solution that was cut: the problem's, or another problem's with `solution: wrong`
    hidden_nats: float | None = None  # the teacher's surprise at what the rule's share hides; None: not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The training data of one rollout: both prompts, and the response that student and teacher score."""

    problem: Problem
    sample_index: int
    key: int  # 63-bit key of (run seed, step, problem id, sample index); all randomness of this sample comes from it
    student_prompt_ids: TokenIds
    response_ids: TokenIds
    teacher_prompt_ids: TokenIds | None = None  # None: no teacher (SFT)
    full_teacher_prompt_ids: TokenIds | None = None  # shows the complete reference; only for partner=full_teacher
    reveal: Reveal | None = None
    rollout: Rollout | None = None  # None: the response was not sampled (SFT)
    advantage: float | None = None  # of every response token; only for GRPO
    old_logprobs: tuple[float, ...] | None = None  # before the first update of the step; None: this is the first update
    weight: float = 1.0  # of each token in the sum of the loss


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleScore:
    """What the loss measured on one sample. Sums run over its response tokens, in nats unless noted otherwise."""

    loss_sum: float
    num_tokens: int  # response tokens
    loss_tokens: int  # response tokens that carry loss
    student_entropy_sum: float = 0.0
    teacher_entropy_sum: float = 0.0
    selected: tuple[int, ...] = ()  # positions in the response, from 0
    divergence_selected_sum: float = 0.0  # unclipped
    divergence_other_sum: float = 0.0
    clipped_mass_sum: float = 0.0  # target mass on clipped entries, summed over tokens that carry loss
    clipped_entries: int = 0  # clipped entries of the target; GRPO: tokens whose ratio is clipped
    token_logprobs: tuple[float, ...] | None = None  # of the response; None: the loss does not need them
    sampler_gap_max: float | None = None  # max |sampler log-prob - trainer log-prob|; None: not sampled in this step


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """The results of one optimiser step."""

    scores: tuple[SampleScore, ...]  # in the order of the samples
    grad_norm: float  # before clipping
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each phase: teacher, student, optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an objective did in one step."""

    samples: tuple[Sample, ...]
    scores: tuple[SampleScore, ...]  # of the first update, in the order of the samples
    updates: tuple[UpdateReport, ...]  # one per optimiser step
    extras: dict[str, float] = field(default_factory=dict)  # the objective's own metrics, by their key
    warnings: tuple[str, ...] = ()  # for the console


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One training step, as it is written to metrics.jsonl and samples/."""

    step: int
    metrics: dict[str, float]
    samples: tuple[Sample, ...]
    scores: tuple[SampleScore, ...]
    warnings: tuple[str, ...] = ()  # for the console


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """One sampled answer and its grade."""

    problem_id: str
    sample_index: int
    response_text: str
    num_tokens: int
    finished: bool
    outcome: Literal["right", "wrong", "no_answer", "timeout"]
    extracted: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """An evaluation of one model on one problem file."""

    step: int
    benchmark: str
    num_problems: int
    samples_per_problem: int
    metrics: dict[str, float]  # avg, bounds of its interval, pass@k, maj, truncated share, mean length, time-outs
    answers: tuple[Graded, ...]
