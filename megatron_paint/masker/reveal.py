"""The overlap masker's decision: how much of the solution the teacher is shown for each rollout of a step.

A higher overlap hides more (PAINT, arXiv 2604.26573); the linear map, its floor and the rules of cutting are ours.
Everything is a pure function of text, settings and keys.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derangement, derive_key, uniforms
from megatron_paint.masker.cut import Offsets, cut_solution
from megatron_paint.masker.overlap import MaskerPool, Pair, measure_overlaps
from megatron_paint.records import Overlap, Problem, Reveal

if TYPE_CHECKING:
    from megatron_paint.config.settings import RevealSettings


def reveal_share(overlap: float, *, minimum: float) -> float:
    """The share of the solution to show, in [minimum, 1]: 1 at overlap 0, falling to the minimum at overlap 1."""
    return minimum + (1 - minimum) * (1 - overlap) if overlap > 0 else 1.0


def inverted_share(overlap: float, *, minimum: float) -> float:
    """The control with the direction turned round: the minimum at overlap 0, rising to 1 at overlap 1."""
    return minimum + (1 - minimum) * overlap if overlap < 1 else 1.0


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
