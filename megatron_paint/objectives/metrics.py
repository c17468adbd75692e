"""What a step writes into the run folder: its line of metrics and its lines of samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_paint.config.domains import BOXED_GRADERS, DomainSettings, domain_of
from megatron_paint.grading.boxes import ANY_BOX, box_spans
from megatron_paint.records import (
    LikelyTokens,
    Reveal,
    Sample,
    SampleScore,
    StepReport,
    StepResult,
    TokenIds,
    UpdateReport,
)

PHASES = ("rollout", "mask", "teacher", "student", "optimizer")
CLIP_LIMIT = 0.2  # mean clipped share; ours
CLIP_STEPS = 10
DIGITS = 4  # significant digits of a value of one token


def ratio(total: float, count: float) -> float:
    """total / count. It is NaN, which is written as null, if there is nothing to count."""
    return total / count if count else math.nan


def mean_of(name: str, scores: Sequence[SampleScore], count: Callable[[SampleScore], int]) -> float:
    """The sum `name` over `count`, for the scores that have this sum. NaN if none has it."""
    having = [score for score in scores if name in score.sums]
    return ratio(sum(score.sums[name] for score in having), sum(map(count, having)))


def metrics_of(result: StepResult, *, step: int, lr: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """The metrics.jsonl line of one step; entropies, divergences and loss in nats.

    seconds: phase -> wall time outside the policy's updates; their own times are added. A missing phase took no time.
    `step` is the wall time of the complete step; without it, the sum of the phases is used.
    Denominators. Loss tokens: loss (0 without any), clip/share and clip/entries (clipped entries per token). Response
    tokens: entropy/*, selected/share. Selected positions, all others: divergence/selected_mean, divergence/other_mean.
    These count only the responses whose loss measures them. Samples: response/length_mean; those sampled
    in this step: response/truncated_share; those with a reveal: overlap/mean, reveal/mean (the share asked for),
    anchors/none_share (those whose reference has no anchor). Updates: grad_norm. A mean over nothing is NaN, except
    where 0 is named above. The objective's extras come last and replace a value of the same key.
    """
    samples, scores = result.samples, result.scores
    tokens, loss_tokens = sum(s.num_tokens for s in scores), sum(s.loss_tokens for s in scores)
    selected = sum(len(s.selected) for s in scores)
    measured = sum(s.num_tokens for s in scores if s.sums) or tokens
    reveals = [sample.reveal for sample in samples if sample.reveal is not None]
    sampled = [sample.rollout for sample in samples if sample.rollout.finished is not None]
    phases = dict.fromkeys(PHASES, 0.0)
    for timed in (seconds, *(update.seconds for update in result.updates)):
        for phase, took in timed.items():
            phases[phase] = phases.get(phase, 0.0) + took
    total = phases.pop("step", None)
    return {
        "step": step,
        "loss": sum(s.loss_sum for s in scores) / max(loss_tokens, 1),
        "num_tokens": tokens,
        "overlap/mean": ratio(sum(reveal.overlap.score for reveal in reveals), len(reveals)),
        "reveal/mean": ratio(sum(reveal.share for reveal in reveals), len(reveals)),
        "anchors/none_share": ratio(sum(not reveal.overlap.anchors for reveal in reveals), len(reveals)),
        "loss_tokens": loss_tokens,
        "entropy/student_mean": mean_of("student_entropy", scores, lambda s: s.num_tokens),
        "entropy/teacher_mean": mean_of("teacher_entropy", scores, lambda s: s.num_tokens),
        "selected/share": ratio(selected, measured),
        "divergence/selected_mean": mean_of("divergence_selected", scores, lambda s: len(s.selected)),
        "divergence/other_mean": mean_of("divergence_other", scores, lambda s: s.num_tokens - len(s.selected)),
        "clip/share": sum(s.sums.get("clipped_mass", 0.0) for s in scores) / max(loss_tokens, 1),
        "clip/entries": sum(s.sums.get("clipped_entries", 0.0) for s in scores) / max(loss_tokens, 1),
        "response/length_mean": ratio(tokens, len(samples)),
        "response/truncated_share": ratio(sum(not rollout.finished for rollout in sampled), len(sampled)),
        "grad_norm": ratio(sum(update.grad_norm for update in result.updates), len(result.updates)),
        "lr": lr,
        **_sampler_gap(scores),
        **{f"time/{phase}_s": took for phase, took in phases.items()},
        "tokens_per_second": ratio(tokens, sum(phases.values()) if total is None else total),
        **_support_metrics(scores),
        **_staleness(samples, scores),
        **_policy_metrics(result.updates),
        **result.extras,
    }


def _sampler_gap(scores: Sequence[SampleScore]) -> dict[str, float]:
    """Over the responses whose sampler has log-probabilities; NaN without any."""
    known = [score for score in scores if score.sampler_gap is not None]
    tokens = sum(score.num_tokens for score in known)
    return {
        "sampler_gap/max": max((score.sampler_gap.largest for score in known), default=math.nan),
        "sampler_gap/mean": ratio(sum(score.sampler_gap.total for score in known), tokens),
        "sampler_gap/above_share": ratio(sum(score.sampler_gap.above for score in known), tokens),
    }


def _support_metrics(scores: Sequence[SampleScore]) -> dict[str, float]:
    """Means over response tokens; nothing without a support."""
    if not any("outside_mass" in score.sums for score in scores):
        return {}
    names = {"support/outside_mass": "outside_mass", "support/size": "support_size"}
    return {key: mean_of(name, scores, lambda s: s.num_tokens) for key, name in names.items()}


def _policy_metrics(updates: Sequence[UpdateReport]) -> dict[str, float]:
    """Means over the updates of what the policy itself measures."""
    names = updates[0].metrics if updates else {}
    return {name: ratio(sum(update.metrics[name] for update in updates), len(updates)) for name in names}


def _staleness(samples: Sequence[Sample], scores: Sequence[SampleScore]) -> dict[str, float]:
    """The age of responses that an engine outside of the run sampled, and the loss's importance weights, if any."""
    behind = [sample.rollout.origin.behind for sample in samples if sample.rollout.origin is not None]
    older = [score for sample, score in zip(samples, scores, strict=True) if sample.rollout.is_behind]
    weighted = [score for score in older if "importance" in score.sums]
    names = {"importance/mean": "importance", "importance/limited_share": "importance_limited"}
    return {
        **({"rollout/steps_behind": ratio(sum(behind), len(behind))} if behind else {}),
        **({key: mean_of(name, weighted, lambda s: s.num_tokens) for key, name in names.items()} if weighted else {}),
    }


def sample_lines(report: StepReport, *, decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """The lines of samples/step_*.jsonl, in the order of the samples.

    decode: token ids -> text, special tokens included. `loss` is in nats per token that carries loss; it is 0 if no
    token does. A sample without a reveal has null in `overlap` and `reveal`, and no `anchors`. `finished` is null for a
    response that was not sampled. `advantage` is null except under GRPO, which also has `reward`. With a support
    `outside_mass` and `support_size` have a value for each response token. So have `divergence`, `student_entropy`,
    `teacher_entropy` and `logprob_gap` (trainer minus sampler) of the samples that `run.keep_token_values` keeps, with
    4 significant digits. `student_top` and `teacher_top` have what `run.keep_top_tokens` asks for. `correct` is the
    verdict where responses are graded. PAINT and OPSD have `left_out` for a response that is not trained on; under GRPO
    its `advantage` is 0.
    `sampler_gap` compares the log-probabilities of sampler and trainer, where the sampler has them. `origin` says
    where, and with which weights, an engine outside of the run sampled the response. A file of these lines, or a folder
    of such files, can be replayed.
    """
    return [
        {
            "id": sample.problem.id,
            "step": report.step,
            "sample": sample.sample_index,
            "domain": sample.problem.domain,
            "student_prompt_ids": list(sample.student_prompt_ids),
            "teacher_prompt_ids": _list(sample.teacher_prompt_ids),
            "response_ids": list(sample.response_ids),
            "response_text": decode(list(sample.response_ids)),
            "finished": sample.rollout.finished,
            "overlap": None if sample.reveal is None else sample.reveal.overlap.score,
            "anchors": [] if sample.reveal is None else _anchors(sample.reveal),
            "reveal": None if sample.reveal is None else _reveal(sample.reveal),
            "loss": score.loss_sum / max(score.loss_tokens, 1),
            "selected": list(score.selected),
            **({} if sample.reward is None else {"reward": sample.reward}),
            "advantage": sample.advantage,
            **({} if sample.correct is None else {"correct": sample.correct}),
            **({} if sample.left_out is None else {"left_out": sample.left_out}),
            **({} if sample.rollout.origin is None else {"origin": asdict(sample.rollout.origin)}),
            **({} if score.sampler_gap is None else {"sampler_gap": asdict(score.sampler_gap)}),
            **{name: _values(name, values) for name, values in score.per_token.items()},
            **{f"{side}_top": _likely(tokens) for side, tokens in score.likely.items()},
        }
        for sample, score in zip(report.samples, report.scores, strict=True)
    ]


def _values(name: str, values: Sequence[float]) -> list[float]:
    """Six decimals of what every sample has, four significant digits of what few samples have."""
    if name in ("outside_mass", "support_size"):
        return [round(value, 6) for value in values]
    return [_short(value) for value in values]


def _likely(tokens: LikelyTokens) -> dict[str, list[list[float]]]:
    return {
        "ids": [list(ids) for ids in tokens.ids],
        "probabilities": [[_short(value) for value in row] for row in tokens.probabilities],
    }


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def no_answer_share(lines: Sequence[Mapping[str, Any]], domains: Mapping[str, DomainSettings]) -> float:
    """The share of sampled responses without a final answer in a closed box. lines: those of `sample_lines`.

    Only the domains whose answers are in boxes count. NaN if no such response was sampled.
    """
    sampled = [
        line["response_text"]
        for line in lines
        if line["finished"] is not None and domain_of(domains, line["domain"]).grader in BOXED_GRADERS
    ]
    return ratio(sum(not box_spans(text, opener=ANY_BOX) for text in sampled), len(sampled))


def _list(ids: TokenIds | None) -> list[int] | None:
    return None if ids is None else list(ids)


def _anchors(reveal: Reveal) -> list[dict[str, Any]]:
    return [{"text": a.text, "kind": a.kind, "found": a.found} for a in reveal.overlap.anchors]


def _reveal(reveal: Reveal) -> dict[str, Any]:
    """What the teacher was shown. Without the last keys it is a part of the problem's own solution."""
    given = {"of": reveal.of, "example": reveal.example, "peer": reveal.peer, "hidden_nats": reveal.hidden_nats}
    return {
        "share": reveal.share,
        "shown_tokens": reveal.shown_tokens,
        "total_tokens": reveal.total_tokens,
        "shown_text": reveal.shown_text,
        "reference_text": reveal.reference,
        **({} if reveal.solution == "own" else {"solution": reveal.solution}),
        **({} if reveal.view == "full" else {"view": reveal.view}),
        **{name: value for name, value in given.items() if value is not None},
    }


class ClipWatch:
    """Warns when the mean clipped share stays above 0.2 for 10 steps in a row.

    It watches a clip of single vocabulary entries, which reverses gradients then.
    """

    def __init__(self) -> None:
        self.above = 0  # steps in a row

    def update(self, metrics: Mapping[str, float]) -> str | None:
        """A warning at the 10th step in a row above the limit and at every 10th after it."""
        self.above = self.above + 1 if metrics["clip/share"] > CLIP_LIMIT else 0
        if self.above == 0 or self.above % CLIP_STEPS:
            return None
        return (
            f"clip/share has been above {CLIP_LIMIT} for {self.above} steps (now {metrics['clip/share']:.2f}): the "
            "clip reverses the gradient on the entries it cuts, and the loss no longer shows how far the student is "
            "from the teacher. Raise objective.loss.clip or set it to null."
        )
