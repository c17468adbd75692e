"""The overlap masker's decision: how much of the solution the teacher is shown for each rollout of a step.

A higher overlap hides more (PAINT, arXiv 2604.26573); the linear map, its floor and the rules of cutting are ours.
Everything is a pure function of text, settings and keys.
"""

import dataclasses
import math
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derangement, derive_key, uniforms
from megatron_paint.masker.latex import Span, alignments, boxes, math_spans
from megatron_paint.masker.overlap import MaskerPool, Pair, measure_overlaps
from megatron_paint.records import Overlap, Problem, Reveal

if TYPE_CHECKING:
    from megatron_paint.config.settings import RevealSettings

Offsets = Sequence[tuple[int, int]]  # start and end of each token of a solution, in characters

BOUNDARY_WINDOW = 0.15  # of the prefix: a sentence or line end this near its end is cut at
SPAN_SHARE = 0.5  # of the prefix: hiding a whole math span must leave this much, else it is cut inside

_CLOSING = r"[\"'\u201d\u2019)\]}$*]*"  # quotes, brackets and delimiters that belong to the sentence they close
_BOUNDARY = re.compile(rf"\n|[.!?]{_CLOSING}(?=\s|$)|[\u3002\uff01\uff1f]{_CLOSING}")
_ROW_BOUNDARY = re.compile(r"\\\\|\\.|\n", re.DOTALL)


def reveal_share(overlap: float, *, minimum: float) -> float:
    """The share of the solution to show, in [minimum, 1]: 1 at overlap 0, falling to the minimum at overlap 1."""
    return minimum + (1 - minimum) * (1 - overlap) if overlap > 0 else 1.0


def inverted_share(overlap: float, *, minimum: float) -> float:
    """The control with the direction turned round: the minimum at overlap 0, rising to 1 at overlap 1."""
    return minimum + (1 - minimum) * overlap if overlap < 1 else 1.0


def cut_solution(
    solution: str, *, share: float, offsets: Offsets, unit: str = "token", hide_answer: bool = False
) -> str:
    """The prefix of a solution that a share in [0, 1] of it shows; the solution itself, byte for byte, at share 1.

    Keeps the first ceil(share x count - 1e-9) tokens or segments (sentences and lines, math spans kept whole), then
    backs off, never forward: to the last sentence or line end in the last 15 % of that prefix, else out of a math span
    or box, and never into a character. White space at the end of a cut prefix goes. `hide_answer` ends the prefix
    before the last box whatever the share.
    """
    found_boxes = boxes(solution)
    spans = _merged([*math_spans(solution, alignments(solution)), *found_boxes])
    if unit == "segment":
        ends = list(_segment_ends(solution, spans))
        kept = _kept(share, len(ends))
        limit = ends[kept - 1] if kept else 0
    else:
        limit = _token_limit(solution, offsets, _kept(share, len(offsets)))
    at_boundary = unit == "segment" or limit == len(solution)
    if hide_answer and found_boxes:
        last_box = max(found_boxes, key=lambda box: box.end)
        if last_box.start < limit:
            limit, at_boundary = last_box.start, False
    if limit == len(solution):
        return solution
    return solution[: limit if at_boundary else _back_off(solution, limit, spans)].rstrip()


def reveal_step(
    problems: Sequence[Problem],
    rollout_texts: Sequence[str],
    *,
    settings: "RevealSettings",
    keys: Sequence[int],
    token_offsets: Callable[[str], Offsets],
    pool: MaskerPool | None = None,
) -> list[Reveal]:
    """What the teacher is shown for each rollout of a whole step, in order.

    problems, rollout_texts, keys: one entry a rollout (a problem stands once per sample); keys as in `Sample.key`.
    token_offsets: solution -> the characters of its tokens. `rule: shuffled` and `solution: wrong` pair different
    problems, so they need the whole step and raise UserError where it holds only one problem.
    """
    wrong = settings.solution == "wrong"
    shown_of = _partners(problems, keys, setting="objective.reveal.solution: wrong") if wrong else range(len(problems))
    references = [problems[index].solution for index in shown_of]
    pairs = [
        Pair(problem.problem, reference, rollout)
        for problem, reference, rollout in zip(problems, references, rollout_texts, strict=True)
    ]
    overlaps = measure_overlaps(pairs, anchors=settings.anchors, pool=pool)
    if settings.solution == "none":
        return [
            Reveal(overlap=overlap, share=0.0, shown_tokens=0, total_tokens=0, shown_text="", reference="")
            for overlap in overlaps
        ]
    shares = _shares(problems, overlaps, settings=settings, keys=keys)
    return [
        _reveal(overlap, reference, share, settings=settings, offsets=token_offsets(reference))
        for overlap, reference, share in zip(overlaps, references, shares, strict=True)
    ]


def limit_hidden(reveal: Reveal, surprise: Sequence[float], *, settings: "RevealSettings", offsets: Offsets) -> Reveal:
    """The reveal with more shown where what it hides would surprise the teacher by more than `settings.hidden_nats`.

    surprise: minus the log-probability of each token of the reference, from a teacher that is shown what the reveal
    shows. Shown are the fewest tokens whose rest is within the limit once they are cut as ever; with `hide_answer` all
    but the last box, where nothing less will do. The idea is ours: what a teacher cannot write by itself it cannot
    teach either.
    """
    if len(surprise) != reveal.total_tokens:
        raise ValueError(f"surprise: got {len(surprise)} values for a reference of {reveal.total_tokens} tokens")
    rest = [0.0, *accumulate(reversed(surprise))][::-1]  # what is hidden where so many tokens are shown, in nats
    hidden = rest[reveal.shown_tokens]
    if hidden <= settings.hidden_nats:
        return dataclasses.replace(reveal, hidden_nats=hidden)

    def cut_at(kept: int) -> Reveal:
        return _reveal(reveal.overlap, reveal.reference, kept / len(surprise), settings=settings, offsets=offsets)

    # A later cut never shows less, so that the first one that will do can be bisected for.
    kept = range(reveal.shown_tokens + 1, len(rest))
    enough = bisect_left(kept, True, key=lambda count: rest[cut_at(count).shown_tokens] <= settings.hidden_nats)
    return dataclasses.replace(cut_at(kept[min(enough, len(kept) - 1)]), hidden_nats=hidden)


def _reveal(overlap: Overlap, reference: str, share: float, *, settings: "RevealSettings", offsets: Offsets) -> Reveal:
    shown = cut_solution(reference, share=share, offsets=offsets, unit=settings.unit, hide_answer=settings.hide_answer)
    whole = len(shown) == len(reference)
    return Reveal(
        overlap=overlap,
        share=share,
        shown_tokens=len(offsets) if whole else sum(start < len(shown) for start, _ in offsets),
        total_tokens=len(offsets),
        shown_text=shown,
        reference=reference,
    )


def _shares(
    problems: Sequence[Problem], overlaps: Sequence[Overlap], *, settings: "RevealSettings", keys: Sequence[int]
) -> list[float]:
    minimum = settings.minimum
    by_overlap = [reveal_share(overlap.score, minimum=minimum) for overlap in overlaps]
    match settings.rule:
        case "overlap":
            return by_overlap
        case "shuffled":
            return [by_overlap[i] for i in _partners(problems, keys, setting="objective.reveal.rule: shuffled")]
        case "inverted":
            return [inverted_share(overlap.score, minimum=minimum) for overlap in overlaps]
        case "full":
            return [1.0] * len(overlaps)
        case "random":
            draws = (float(uniforms(derive_key(key, "reveal"), 1)[0]) for key in keys)
            return [minimum + (1 - minimum) * draw for draw in draws]
        case "fixed":
            if settings.share is None:
                raise UserError("objective.reveal.share is null; rule: fixed needs the share to show, in [0, 1]")
            return [settings.share] * len(overlaps)
        case unknown:
            raise UserError(f"objective.reveal.rule: {unknown!r} is not a rule of this version")


def _partners(problems: Sequence[Problem], keys: Sequence[int], *, setting: str) -> list[int]:
    """For each rollout, the index of a rollout of another problem of the step, drawn by a key of the whole step.

    The n-th rollout of a problem gets the n-th of its partner, so that every rollout is used once where all problems
    have as many. Does not depend on the order in which problems stand.
    """
    rollouts_of: dict[str, list[int]] = {}
    for index, problem in enumerate(problems):
        rollouts_of.setdefault(problem.id, []).append(index)
    ids = sorted(rollouts_of)
    if len(ids) < 2:
        raise UserError(
            f"{setting} takes another problem of the same step, and this step has {len(ids)};"
            " set data.problems_per_step to 2 or more"
        )
    partner_of = derangement(derive_key(setting, *sorted(keys)), len(ids))
    partners = [0] * len(problems)
    for mine, other in zip(ids, partner_of, strict=True):
        lent = rollouts_of[ids[other]]
        for place, index in enumerate(rollouts_of[mine]):
            partners[index] = lent[place % len(lent)]
    return partners


def _kept(share: float, count: int) -> int:
    return min(count, math.ceil(share * count - 1e-9))


def _token_limit(solution: str, offsets: Offsets, kept: int) -> int:
    """Where the first `kept` tokens end, in characters; a character that later tokens share is left out."""
    if kept >= len(offsets):
        return len(solution)
    limit = min(offsets[kept - 1][1], offsets[kept][0]) if kept else 0
    while 0 < limit < len(solution) and _is_inside_character(solution, limit):
        limit -= 1
    return limit


def _is_inside_character(text: str, at: int) -> bool:
    """Whether a cut would part an accent, a joined emoji or a variation mark from what it belongs to."""
    return (
        unicodedata.category(text[at])[0] == "M"
        or text[at] in "\u200d\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
        or text[at - 1] == "\u200d"
    )


def _back_off(solution: str, limit: int, spans: list[Span]) -> int:
    boundaries = _boundaries(solution, limit, spans, at_least=limit * (1 - BOUNDARY_WINDOW))
    boundary = max(boundaries, default=None)
    if boundary is not None:
        return boundary
    span = _span_around(spans, limit)
    if span is None:
        return limit
    if span.start < SPAN_SHARE * limit:
        return _cut_inside(solution, limit, span)
    return span.start


def _boundaries(solution: str, limit: int, spans: list[Span], at_least: float) -> Iterator[int]:
    """Sentence and line ends outside math, from `at_least` up to the limit."""
    for match in _BOUNDARY.finditer(solution, max(0, math.ceil(at_least) - 8)):
        end = match.start() if match.group() == "\n" else match.end()
        if match.start() >= limit and end > limit:
            break
        if at_least <= end <= limit and _span_around(spans, end) is None:
            yield end


def _cut_inside(solution: str, limit: int, span: Span) -> int:
    """The last row or line end inside a span, else its start; never inside a box that the span holds."""
    inner = [box for box in boxes(solution[: span.end]) if box.start >= span.start]
    cut = span.start
    for match in _ROW_BOUNDARY.finditer(solution, span.content_start, limit):
        is_end = match.group() in ("\\\\", "\n")
        if is_end and not any(box.start < match.start() < box.end for box in inner):
            cut = match.start()
    return cut if solution[span.content_start : cut].strip() else span.start


def _segment_ends(solution: str, spans: list[Span]) -> Iterator[int]:
    """Where the sentences and lines end, the last one at the end of the solution."""
    last = 0
    for end in _boundaries(solution, len(solution), spans, at_least=0):
        if solution[last:end].strip() and solution[end:].strip():
            yield end
            last = end
    yield len(solution)


def _span_around(spans: list[Span], at: int) -> Span | None:
    """The span that a position lies strictly inside of."""
    index = bisect_right(spans, at, key=lambda span: span.start) - 1
    return spans[index] if index >= 0 and spans[index].start < at < spans[index].end else None


def _merged(spans: list[Span]) -> list[Span]:
    """The spans in order, those that overlap made into one."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start < merged[-1].end:
            if span.end > merged[-1].end:
                merged[-1] = Span(merged[-1].start, merged[-1].content_start, span.content_end, span.end)
        else:
            merged.append(span)
    return merged
