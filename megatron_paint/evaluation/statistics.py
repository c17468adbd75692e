"""Figures of an evaluation, with intervals over the draw of problems.

The score of a problem is the share of its samples that are right. Avg@n is the mean of the scores. Few problems make
every figure uncertain: 90 problems give a standard error of about 3.5 points. So compare two models only by
`paired_difference`.
"""

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_paint.base.errors import UserError
from megatron_paint.grading.normal_form import normal_form
from megatron_paint.records import EvalReport, Graded

GREEDY = -1  # sample_index of greedy answers in an EvalReport
RESAMPLES = 10_000
LEVEL = 0.95
BLOCK_SIZE = 2_000_000  # resampled scores in memory at once
SIGN_DRAWS = 100_000
MAX_EXACT_PROBLEMS = 16  # up to this number of problems, all sign combinations are computed
ROUNDING = 1e-12
DOMAIN_AVG = re.compile(r"domain/[^/]+/avg")
SHARES, DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)  # ranges of a problem's score and of a difference of two scores


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its interval. They are shares or differences of shares."""

    mean: float
    low: float
    high: float


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Returns the unbiased chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n. Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got k={k}, n={samples}, c={right}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_score(answers: Sequence[Graded]) -> float:
    """Returns the chance that the most frequent answer of one problem is right, in [0, 1].

    All right answers are one candidate. Wrong answers with different normal forms are different candidates, and so are
    wrong answers of which only a user's function knows what they are. Samples without an answer and those whose grader
    failed do not vote. If k candidates are equally frequent, each has the chance 1/k.
    """
    votes = Counter(
        "right" if answer.outcome == "right" else _wrong_candidate(answer)
        for answer in answers
        if answer.outcome not in ("no_answer", "error")
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    return float(votes["right"] == most) / sum(count == most for count in votes.values())


def _wrong_candidate(answer: Graded) -> str:
    if answer.extracted is None:
        return f"wrong sample {answer.sample_index}"
    return "wrong " + normal_form(answer.extracted)


def mean_interval(
    groups: Sequence[np.ndarray], *, key: str, level: float = LEVEL, limits: tuple[float, float] = SHARES
) -> Interval:
    """Returns the mean of the groups' means with a percentile interval that redraws problems within each group.

    groups: one array [problems] of scores within `limits` for each benchmark. key: names the draw; the same key and
    sizes draw the same problems again. level: coverage in (0, 1). Redrawing a group of equal scores gives no spread, so
    such a group widens the interval by its `equal_scores_interval`.
    """
    generator = np.random.default_rng(zlib.crc32(key.encode("utf-8")))
    means, below, above = np.zeros(RESAMPLES), 0.0, 0.0
    for scores in groups:
        rows = max(1, BLOCK_SIZE // len(scores))
        for start in range(0, RESAMPLES, rows):
            stop = min(start + rows, RESAMPLES)
            drawn = generator.integers(0, len(scores), size=(stop - start, len(scores)))
            means[start:stop] += scores[drawn].mean(axis=1) / len(groups)
        if np.ptp(scores) < ROUNDING:
            equal = equal_scores_interval(float(scores[0]), len(scores), level=level, limits=limits)
            below += (equal.mean - equal.low) / len(groups)
            above += (equal.high - equal.mean) / len(groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([scores.mean() for scores in groups])), float(low - below), float(high + above))


def equal_scores_interval(score: float, problems: int, *, level: float, limits: tuple[float, float]) -> Interval:
    """Returns the interval of the mean score if all drawn problems have the same score.

    The share of problems with this score is at least q = ((1 - level) / 2)^(1 / problems). With a smaller share, this
    many equal draws would be less likely than (1 - level) / 2. All other problems may have any score within `limits`.
    If all scores are 1 or all are 0, this is the interval of Clopper and Pearson (Biometrika 26, 1934): for 0 and 95 %
    about [0, 3.7 / problems].
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
    """Returns the mean length in tokens over the answers whose length is known; NaN if none is known."""
    known = [answer.num_tokens for answer in graded if answer.num_tokens]
    return sum(known) / len(known) if known else math.nan


def length_text(metrics: Mapping[str, float]) -> str:
    """Returns the mean length as text; "-" if it is not known, which is NaN in memory and null in a file."""
    length = metrics["length_mean"]
    return "-" if length is None or math.isnan(length) else f"{length:,.0f}"


def problem_scores(report: EvalReport) -> dict[str, float]:
    """Returns the share of right samples of each problem, without greedy answers."""
    sampled = [answer for answer in report.answers if answer.sample_index != GREEDY]
    return {name: _right(group) / len(group) for name, group in _by_problem(sampled).items()}


def build_report(step: int, benchmark: str, graded: Sequence[Graded], *, greedy: Sequence[Graded] = ()) -> EvalReport:
    """Returns the report on n sampled answers for each problem, and on greedy answers if there are any.

    The metrics are shares in [0, 1] unless noted: avg, avg/low and avg/high (95 % over problems), avg/sampling_se
    (standard error from the draw of n samples; only for n > 1), avg/problem_se (standard error from the draw of
    problems; only for more than one), pass@1 .. pass@n, maj@n, truncated_share, no_answer_share, length_mean (tokens;
    NaN if no length is known), timeouts, errors and box_in_thought (counts; see `Graded`), and with greedy answers
    greedy and greedy/length_mean. With scores of a user's function: score, the mean over all samples, where a right
    answer of another grader is 1 and any other 0. With several domains: `domain/NAME/avg`, its interval and the number
    of problems of each. The report has greedy answers with sample_index -1. Raises ValueError unless all problems have
    equally many samples.
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
    metrics["errors"] = float(sum(answer.outcome == "error" for answer in graded))
    metrics["box_in_thought"] = float(sum(answer.box_in_thought for answer in graded))
    if any(answer.score is not None for answer in graded):
        metrics["score"] = sum(_score(answer) for answer in graded) / len(graded)
    metrics |= _by_domain(graded, benchmark)
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


def _score(answer: Graded) -> float:
    return float(answer.outcome == "right") if answer.score is None else answer.score


def domains_in(metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the names of the domains whose accuracy an evaluation has; none if all problems are of one domain."""
    return tuple(name.split("/")[1] for name in metrics if DOMAIN_AVG.fullmatch(name))


def _by_domain(graded: Sequence[Graded], benchmark: str) -> dict[str, float]:
    """Returns avg, avg/low, avg/high and problems of each domain, in the order of the problems; {} for one domain."""
    names = dict.fromkeys(answer.domain for answer in graded)
    if len(names) < 2:
        return {}
    found: dict[str, float] = {}
    for name in names:
        groups = _by_problem([answer for answer in graded if answer.domain == name])
        scores = np.array([_right(group) / len(group) for group in groups.values()])
        interval = mean_interval([scores], key=f"{benchmark}/{name}")
        found |= {f"domain/{name}/avg": interval.mean, f"domain/{name}/avg/low": interval.low}
        found |= {f"domain/{name}/avg/high": interval.high, f"domain/{name}/problems": float(len(scores))}
    return found


def paired_difference(*, before: EvalReport, after: EvalReport) -> Interval:
    """Returns Avg@n after minus before, paired by problem, with a 95 % interval over the draw of problems.

    Raises UserError if the reports have different benchmarks or problems.
    """
    return macro_difference(before=[before], after=[after])


def macro_average(reports: Sequence[EvalReport]) -> Interval:
    """Returns the mean of the benchmarks' Avg@n, with a 95 % interval over the problems within each benchmark."""
    groups = [np.array(list(problem_scores(report).values())) for report in reports]
    return mean_interval(groups, key="/".join(report.benchmark for report in reports))


def macro_difference(*, before: Sequence[EvalReport], after: Sequence[EvalReport]) -> Interval:
    """Returns the macro average after minus before, paired by problem, with a 95 % interval.

    Raises UserError unless both have the same benchmarks in the same order and the same problems.
    """
    groups = paired_differences(before=before, after=after)
    return mean_interval(groups, key="/".join(report.benchmark for report in before), limits=DIFFERENCES)


def sign_flip_p_value(groups: Sequence[np.ndarray], *, key: str) -> float:
    """Returns the chance of a mean at least as far from 0 as the observed one if the sign of each difference is random.

    groups: one array [problems] of paired differences for each benchmark; the mean is the mean of the groups' means.
    Up to 16 problems with a difference the chance is exact over all signs. Above, it is estimated from 100,000 draws
    named by `key`, with the observed signs counted as one more draw.
    """
    weighted = np.concatenate([group / len(group) for group in groups]) / len(groups)
    weighted = weighted[weighted != 0]
    observed = abs(weighted.sum())
    if len(weighted) <= MAX_EXACT_PROBLEMS:
        signs = 1 - 2 * (np.arange(2 ** len(weighted))[:, None] >> np.arange(len(weighted)) & 1)
        return float(np.mean(np.abs(signs @ weighted) >= observed - ROUNDING))
    generator = np.random.default_rng(zlib.crc32(key.encode("utf-8")))
    rows, extreme = max(1, BLOCK_SIZE // len(weighted)), 1
    for start in range(0, SIGN_DRAWS, rows):
        drawn = generator.integers(0, 2, size=(min(rows, SIGN_DRAWS - start), len(weighted))) * 2 - 1
        extreme += int(np.sum(np.abs(drawn @ weighted) >= observed - ROUNDING))
    return extreme / (SIGN_DRAWS + 1)


def paired_differences(*, before: Sequence[EvalReport], after: Sequence[EvalReport]) -> list[np.ndarray]:
    """Returns score after minus before of each problem: one array [problems] for each benchmark, in the same order.

    Raises UserError if benchmarks or problems differ.
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
