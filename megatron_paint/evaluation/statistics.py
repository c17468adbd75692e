"""Figures of an evaluation, with intervals over the draw of problems.

A problem's score is the share of its samples that are right; Avg@n is the mean of these. Few problems make every
figure uncertain (90 problems: about 3.5 points of standard error): compare two models only by `paired_difference`.
"""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_paint.base.errors import UserError
from megatron_paint.grading.grade import normal_form
from megatron_paint.records import EvalReport, Graded

GREEDY = -1  # sample_index of greedy answers in an EvalReport
RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 2_000_000  # resampled scores held at once
FLIPS = 100_000
MOST_EXACT = 16  # problems whose signs are all gone through
ROUNDING = 1e-12
SHARES, DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)  # what a problem's score, or a difference of two, can be


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its interval, all three shares or differences of shares."""

    mean: float
    low: float
    high: float


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k), with 1 <= k <= n.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got k={k}, n={samples}, c={right}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_score(answers: Sequence[Graded]) -> float:
    """Chance that the most frequent answer of one problem is right, in [0, 1].

    Right answers are one candidate however they are written; wrong ones are told apart by their normal form. Samples
    without an answer do not vote. Among k equally frequent candidates each is taken with chance 1/k.
    """
    votes = Counter(
        "right" if answer.outcome == "right" else "wrong " + normal_form(answer.extracted or "")
        for answer in answers
        if answer.outcome != "no_answer"
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    return float(votes["right"] == most) / sum(count == most for count in votes.values())


def mean_interval(
    groups: Sequence[np.ndarray], *, key: str, level: float = LEVEL, limits: tuple[float, float] = SHARES
) -> Interval:
    """Mean of the groups' means, with a percentile interval that redraws problems within each group.

    groups: one array [problems] of scores within `limits` for each benchmark. key: names the draw; the same key and
    sizes give the same problems again. level: coverage in (0, 1). A group whose scores are all alike, which would be
    certain by redrawing, widens the interval by that of `alike_interval`.
    """
    generator = np.random.default_rng(zlib.crc32(key.encode("utf-8")))
    means, below, above = np.zeros(RESAMPLES), 0.0, 0.0
    for scores in groups:
        rows = max(1, BLOCK // len(scores))
        for start in range(0, RESAMPLES, rows):
            stop = min(start + rows, RESAMPLES)
            drawn = generator.integers(0, len(scores), size=(stop - start, len(scores)))
            means[start:stop] += scores[drawn].mean(axis=1) / len(groups)
        if np.ptp(scores) < ROUNDING:
            alike = alike_interval(float(scores[0]), len(scores), level=level, limits=limits)
            below += (alike.mean - alike.low) / len(groups)
            above += (alike.high - alike.mean) / len(groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([scores.mean() for scores in groups])), float(low - below), float(high + above))


def alike_interval(score: float, problems: int, *, level: float, limits: tuple[float, float]) -> Interval:
    """Interval of the mean score where all of so many problems have the same one, of scores within `limits`.

    Problems with this score make up at least q = ((1 - level) / 2)^(1 / problems) of all: with fewer, so many in a row
    would be less likely than (1 - level) / 2. The others score anything within the limits. Where all are right, or none
    is, this is the interval of Clopper and Pearson (Biometrika 26, 1934), about [0, 3.7 / problems] at 0 and 95 %.
    """
    others = 1 - ((1 - level) / 2) ** (1 / problems)
    low, high = (score + others * (limit - score) for limit in limits)
    return Interval(score, low, high)


def _by_problem(graded: Sequence[Graded]) -> dict[str, list[Graded]]:
    groups: dict[str, list[Graded]] = defaultdict(list)
    for answer in graded:
        groups[answer.problem_id].append(answer)
    sizes = {len(group) for group in groups.values()}
    if len(sizes) != 1:
        raise ValueError(f"every problem needs the same number of samples, at least one, got {sorted(sizes)}")
    return groups


def _right(answers: Sequence[Graded]) -> int:
    return sum(answer.outcome == "right" for answer in answers)


def _mean_length(graded: Sequence[Graded]) -> float:
    """In tokens, over the answers whose length is known."""
    known = [answer.num_tokens for answer in graded if answer.num_tokens]
    return sum(known) / len(known) if known else math.nan


def length_text(metrics: Mapping[str, float]) -> str:
    """The mean length as a reader sees it; a file holds null where it is not known."""
    length = metrics["length_mean"]
    return "-" if length is None or math.isnan(length) else f"{length:,.0f}"


def problem_scores(report: EvalReport) -> dict[str, float]:
    """Share of right samples of each problem, greedy answers left out."""
    sampled = [answer for answer in report.answers if answer.sample_index != GREEDY]
    return {name: _right(group) / len(group) for name, group in _by_problem(sampled).items()}


def build_report(step: int, benchmark: str, graded: Sequence[Graded], *, greedy: Sequence[Graded] = ()) -> EvalReport:
    """The report on sampled answers, n for each problem, and on greedy ones if there are any.

    metrics, shares in [0, 1] unless said otherwise: avg, avg/low and avg/high (95 % over problems), avg/sampling_se
    (standard error from the draw of n samples alone; n > 1) and avg/problem_se (from the draw of problems; more than
    one problem), pass@1 .. pass@n, maj@n, truncated_share, no_answer_share, length_mean (tokens; NaN where no length is
    known), timeouts (a count); greedy and greedy/length_mean with greedy answers, which are kept with sample_index -1.
    """
    groups = _by_problem(graded)
    samples = len(next(iter(groups.values())))
    scores = np.array([_right(group) / samples for group in groups.values()])
    interval = mean_interval([scores], key=benchmark)
    metrics = {"avg": interval.mean, "avg/low": interval.low, "avg/high": interval.high}
    if samples > 1:
        variances = scores * (1 - scores) / (samples - 1)  # of each problem's score; unbiased
        metrics["avg/sampling_se"] = float(np.sqrt(variances.sum()) / len(scores))
    if len(scores) > 1:
        metrics["avg/problem_se"] = float(scores.std(ddof=1) / np.sqrt(len(scores)))
    for k in range(1, samples + 1):
        metrics[f"pass@{k}"] = float(np.mean([pass_at_k(_right(group), samples, k) for group in groups.values()]))
    metrics[f"maj@{samples}"] = float(np.mean([majority_score(group) for group in groups.values()]))
    metrics["truncated_share"] = sum(not answer.finished for answer in graded) / len(graded)
    metrics["no_answer_share"] = sum(answer.outcome == "no_answer" for answer in graded) / len(graded)
    metrics["length_mean"] = _mean_length(graded)
    metrics["timeouts"] = float(sum(answer.outcome == "timeout" for answer in graded))
    if greedy:
        metrics["greedy"] = _right(greedy) / len(greedy)
        metrics["greedy/length_mean"] = _mean_length(greedy)
    return EvalReport(
        step=step,
        benchmark=benchmark,
        num_problems=len(groups),
        samples_per_problem=samples,
        metrics=metrics,
        answers=(*graded, *(replace(answer, sample_index=GREEDY) for answer in greedy)),
    )


def paired_difference(*, before: EvalReport, after: EvalReport) -> Interval:
    """Avg@n after minus before, with a 95 % interval over problems that both solved the same draw of.

    UserError: the reports are on different benchmarks or problems.
    """
    return macro_difference(before=[before], after=[after])


def macro_average(reports: Sequence[EvalReport]) -> Interval:
    """Mean of the benchmarks' Avg@n, with a 95 % interval over the problems within each."""
    groups = [np.array(list(problem_scores(report).values())) for report in reports]
    return mean_interval(groups, key="/".join(report.benchmark for report in reports))


def macro_difference(*, before: Sequence[EvalReport], after: Sequence[EvalReport]) -> Interval:
    """Macro average after minus before, paired by problem, with a 95 % interval; benchmarks in the same order."""
    groups = paired_differences(before=before, after=after)
    return mean_interval(groups, key="/".join(report.benchmark for report in before), limits=DIFFERENCES)


def sign_flip_p_value(groups: Sequence[np.ndarray], *, key: str) -> float:
    """Chance of a mean of the groups' means as far from 0 as this one, if each problem's difference had either sign.

    groups: one array [problems] of paired differences for each benchmark. Exact over all signs up to 16 problems that
    differ at all, else over 100,000 draws that `key` names, with the observed signs counted as one of them.
    """
    weighted = np.concatenate([group / len(group) for group in groups]) / len(groups)
    weighted = weighted[weighted != 0]
    observed = abs(weighted.sum())
    if len(weighted) <= MOST_EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(weighted))[:, None] >> np.arange(len(weighted)) & 1)
        return float(np.mean(np.abs(signs @ weighted) >= observed - ROUNDING))
    generator = np.random.default_rng(zlib.crc32(key.encode("utf-8")))
    rows, extreme = max(1, BLOCK // len(weighted)), 1
    for start in range(0, FLIPS, rows):
        drawn = generator.integers(0, 2, size=(min(rows, FLIPS - start), len(weighted))) * 2 - 1
        extreme += int(np.sum(np.abs(drawn @ weighted) >= observed - ROUNDING))
    return extreme / (FLIPS + 1)


def paired_differences(*, before: Sequence[EvalReport], after: Sequence[EvalReport]) -> list[np.ndarray]:
    """Score after minus before of each problem, one array [problems] for each benchmark, in the same order.

    Errors: UserError where benchmarks or problems are not the same.
    """
    names = [[report.benchmark for report in reports] for reports in (before, after)]
    if names[0] != names[1] or not names[0]:
        raise UserError(f"Only evaluations on the same benchmarks can be compared, got {names[0]} and {names[1]}")
    groups = []
    for old, new in zip(before, after, strict=True):
        old_scores, new_scores = problem_scores(old), problem_scores(new)
        if old_scores.keys() != new_scores.keys():
            odd = sorted(old_scores.keys() ^ new_scores.keys())
            raise UserError(
                f"{old.benchmark}: only evaluations on the same problems can be compared; {len(odd)} are in one only, "
                f"such as {odd[0]!r}. Evaluate both models on the same file with the same evaluation.limit."
            )
        groups.append(np.array([new_scores[name] - old_scores[name] for name in old_scores]))
    return groups
