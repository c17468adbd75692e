"""The records of a training step, in the order in which they appear.

Problem -> Rollout -> Reveal -> Sample -> SampleScore -> StepReport. An evaluation makes Graded, Asked and EvalReport.
All records are frozen: a step makes new records and never changes one. Token ids are tuples of int. Text becomes token
ids once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

TokenIds = tuple[int, ...]
Verdicts = Mapping[str, Sequence[bool]]  # problem id -> whether each rollout of the problem is right
# Why a response is not trained on: its answer is not right, a shorter one is right, or no other right one can be shown.
LeftOut = Literal["wrong", "not_shortest", "no_peer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem with its verified worked solution."""

    id: str  # unique in its file
    problem: str  # the problem's text
    solution: str  # the verified solution; ends in \boxed{answer} in the usual data sets
    answer: str  # the final answer that the grader compares with
    source: str = ""  # where it was read: "file:line"
    view: str = ""  # the text of `objective.reveal.view`; empty: the solution
    domain: str = "math"  # a name of the section `domains`: chooses anchors and grader
    choices: tuple[str, ...] = ()  # the texts of A, B, ... of a multiple-choice problem; empty: not known

    @property
    def reference(self) -> str:
        """What the teacher may be shown of this problem: the chosen view, or the solution."""
        return self.view or self.solution


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpan:
    """Tokens of a response that were sampled with the same weights."""

    version: str
    start: int  # first token, from 0
    end: int  # behind the last token


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutOrigin:
    """Where an engine outside of this process sampled a response."""

    engine: str
    server: str  # its address
    weights: tuple[WeightSpan, ...]
    finish_reason: str  # in the engine's words
    behind: int = 0  # training steps between its weights and those that learn from it (`rollout.ahead`)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response to one problem: sampled from the student, read from a file, or given (SFT)."""

    problem_id: str
    sample_index: int = 0  # 0 .. samples per problem - 1
    prompt_ids: TokenIds  # what the student was shown
    response_ids: TokenIds  # with the end token, if there is one
    # Of sampled tokens, in nats at the sampling temperature, before top-k and top-p; None: not known.
    logprobs: tuple[float, ...] | None = None
    finished: bool | None = None  # True: ended by a stop token; False: cut at the length limit; None: not sampled
    origin: RolloutOrigin | None = None  # None: sampled in this process, read from a file, or given

    @property
    def is_behind(self) -> bool:
        """Whether weights sampled it that are older than those that learn from it."""
        return self.origin is not None and self.origin.behind > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """A piece of the reference that a rollout can reproduce."""

    kind: str  # math: boxed, formula, number; code and text have others besides boxed
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
    reference: str  # the text that was cut; `solution` says whose it is
    hidden_nats: float | None = None  # the teacher's surprise at what the rule's share hides; None: not measured
    solution: str = "own"  # the value of `objective.reveal.solution`
    view: str = "full"  # which text of a problem the reference is
    of: str | None = None  # id of the other problem that the reference belongs to (wrong, other_example)
    example: str | None = None  # text of that problem, which is shown with its reference (other_example)
    peer: int | None = None  # sample index of the response that is the reference (peer_rollout)
    anchors: str = "math"  # the extractor of the reference, whose rules place the cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one rollout is trained on, with what the teacher is shown for it."""

    problem: Problem
    key: int  # non-negative 63-bit key of (run seed, step, problem id, sample index): all randomness of this sample
    rollout: Rollout
    teacher_prompt_ids: TokenIds | None = None  # None: no teacher (SFT)
    full_teacher_prompt_ids: TokenIds | None = None  # with the complete reference; only for partner=full_teacher
    reveal: Reveal | None = None
    reward: float | None = None  # in [0, 1]; only GRPO's
    advantage: float | None = None  # of every token of the response; only GRPO's
    # Under the weights that sampled it, if these are older; else before the step's first update, and None in it.
    old_logprobs: tuple[float, ...] | None = None
    weight: float = 1.0  # of each token in the sum of the loss
    correct: bool | None = None  # the verdict on the response; None: not graded
    left_out: LeftOut | None = None  # why the response is not trained on; None: it is, or GRPO decides by advantage

    @property
    def sample_index(self) -> int:
        return self.rollout.sample_index

    @property
    def student_prompt_ids(self) -> TokenIds:
        return self.rollout.prompt_ids

    @property
    def response_ids(self) -> TokenIds:
        return self.rollout.response_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerGap:
    """How far the sampler's log-probabilities of a response are from the trainer's, in nats."""

    largest: float
    position: int  # of the largest one in the response, from 0
    total: float  # over its tokens
    above: int  # tokens with more than 0.1 nats


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelyTokens:
    """The likeliest tokens of one side at each response token, at temperature 1: the likeliest token first."""

    ids: tuple[TokenIds, ...]
    probabilities: tuple[tuple[float, ...], ...]  # over the complete vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleScore:
    """What the loss measured on one sample. Sums run over its response tokens, in nats unless noted otherwise.

    sums: by name, those that the loss measures.
    student_entropy, teacher_entropy: of all tokens.
    divergence_selected, divergence_other: to the target, at selected tokens and at all others, without a clip. SFT: the
    loss; GRPO: the estimated KL to the reference.
    clipped_mass: target mass on clipped vocabulary entries, of tokens that carry loss; under the clip of tokens the
    share of the gradient that it took.
    clipped_entries: number of clipped vocabulary entries (under the clip of tokens: of tokens), where loss is carried.
    clipped_ratios: number of tokens whose probability ratio is clipped (GRPO).
    outside_mass, support_size: the target's mass outside the support, and the entries of the support.
    per_token: by name, a value for each response token, of the samples whose tokens are kept (`run.keep_token_values`).
    likely: by side, student or teacher, with `run.keep_top_tokens`.
    """

    loss_sum: float
    num_tokens: int  # response tokens
    loss_tokens: int  # those that carry loss
    selected: tuple[int, ...] = ()  # positions in the response, from 0
    sums: dict[str, float] = field(default_factory=dict)
    per_token: dict[str, tuple[float, ...]] = field(default_factory=dict)
    likely: dict[str, LikelyTokens] = field(default_factory=dict)
    token_logprobs: tuple[float, ...] | None = None  # of the response, where the loss asks for them
    sampler_gap: SamplerGap | None = None  # None: no log-probabilities of the sampler


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """The results of one optimiser step."""

    scores: tuple[SampleScore, ...]  # in the order of the samples
    grad_norm: float  # before clipping
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each phase: teacher, student, optimizer
    metrics: dict[str, float] = field(default_factory=dict)  # what only the policy's own kind of model measures, by key


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What an objective did in one step."""

    samples: tuple[Sample, ...]
    scores: tuple[SampleScore, ...]  # of the first update, in the order of the samples
    updates: tuple[UpdateReport, ...]  # one per optimiser step
    extras: dict[str, float] = field(default_factory=dict)  # the objective's own metrics, by their key
    warnings: tuple[str, ...] = ()  # for the console
    verdicts: Verdicts = field(default_factory=dict)  # on all rollouts of the step; empty: they are not graded


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One training step, as it is written to metrics.jsonl and samples/."""

    step: int
    metrics: dict[str, float]
    samples: tuple[Sample, ...]
    scores: tuple[SampleScore, ...]
    warnings: tuple[str, ...] = ()  # for the console
    seconds: float | None = None  # wall time of the complete step


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """One sampled answer and its grade."""

    problem_id: str
    sample_index: int
    response_text: str
    num_tokens: int
    finished: bool
    outcome: Literal["right", "wrong", "no_answer", "timeout", "error"]
    extracted: str | None
    box_in_thought: bool = False  # a thought that never ends holds a box
    domain: str = "math"  # of the problem
    score: float | None = None  # of a user's function, in [0, 1]
    error: str = ""  # why a user's function gave no verdict, where the outcome is error


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A problem of an evaluation, for those who read its answers."""

    id: str
    problem: str  # its text
    answer: str  # the reference answer


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """An evaluation of one model on one problem file."""

    step: int
    benchmark: str
    num_problems: int
    samples_per_problem: int
    metrics: dict[str, float]  # avg, bounds of its interval, pass@k, maj, truncated share, mean length, time-outs
    answers: tuple[Graded, ...]
    problems: tuple[Asked, ...] = ()  # empty: not recorded
