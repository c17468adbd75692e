"""Decides how much of the solution the teacher is shown for each rollout of a step.

A higher overlap hides more (PAINT, arXiv 2604.26573). The linear map, its minimum and the rules of cutting are ours.
Every result is a pure function of text, settings and keys.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derangement, derive_key, uniforms
from megatron_paint.config.domains import DomainSettings, domain_of
from megatron_paint.masker.cut import Offsets, cut_solution
from megatron_paint.masker.overlap import MaskerPool, Pair, extractor_named, measure_overlaps
from megatron_paint.records import Overlap, Problem, Reveal

if TYPE_CHECKING:
    from megatron_paint.config.objective import RevealSettings


def reveal_share(overlap: float, *, minimum: float) -> float:
    """Returns the share of the solution to show: 1 at overlap 0, falling linearly to `minimum` at overlap 1."""
    return minimum + (1 - minimum) * (1 - overlap) if overlap > 0 else 1.0


def inverted_share(overlap: float, *, minimum: float) -> float:
    """Returns the share of the inverted control: `minimum` at overlap 0, rising linearly to 1 at overlap 1."""
    return minimum + (1 - minimum) * overlap if overlap < 1 else 1.0


class Peer(NamedTuple):
    """Another response to the problem of a rollout, which takes the place of the solution."""

    text: str
    sample_index: int


class _Reference(NamedTuple):
    """The text that a teacher may be shown, and whose it is."""

    text: str
    domain: str  # of the problem that it belongs to
    of: str | None = None
    example: str | None = None
    peer: int | None = None


def reveal_step(
    problems: Sequence[Problem],
    rollout_texts: Sequence[str],
    *,
    settings: "RevealSettings",
    keys: Sequence[int],
    token_offsets: Callable[[str], Offsets],
    peers: Sequence[Peer] | None = None,
    pool: MaskerPool | None = None,
    domains: Mapping[str, DomainSettings] | None = None,
) -> list[Reveal]:
    """Returns what the teacher is shown for each rollout of a complete step, in order.

    problems, rollout_texts, keys: one entry for each rollout. A problem with several samples appears several times. The
    keys are those of `Sample.key`. token_offsets: returns start and end of each token of a solution, in characters.
    peers: for each rollout the response that is shown, with `solution: peer_rollout` alone. domains: the section of
    this name; the domain of the problem that a reference belongs to chooses its anchors.
    `rule: shuffled`, `solution: wrong` and `solution: other_example` pair different problems, so they need the complete
    step. Raises UserError if the step then holds only one problem.
    The overlap is that with the reference. If the teacher is shown none of this problem (`none`, `reference_free`,
    `other_example`), it is that with the problem's own reference.
    """
    references = _references(problems, keys, settings=settings, peers=peers)
    own = settings.solution in ("none", "reference_free", "other_example")
    pairs = [
        Pair(problem.problem, problem.reference if own else reference.text, rollout)
        for problem, reference, rollout in zip(problems, references, rollout_texts, strict=True)
    ]
    of_references, of_problems = (
        [anchors_of(one.domain, domains or {}, default=settings.anchors) for one in every]
        for every in (references, problems)
    )
    overlaps = measure_overlaps(pairs, anchors=of_problems if own else of_references, pool=pool)
    if settings.solution in ("none", "reference_free"):
        nothing = Reveal(
            overlap=Overlap(score=0.0, anchors=()),
            share=0.0,
            shown_tokens=0,
            total_tokens=0,
            shown_text="",
            reference="",
            solution=settings.solution,
            view=settings.view,
        )
        return [dataclasses.replace(nothing, overlap=overlap) for overlap in overlaps]
    shares = _shares(problems, overlaps, settings=settings, keys=keys)
    return [
        _cut(
            _uncut(overlap, reference, settings, anchors),
            share,
            settings=settings,
            offsets=token_offsets(reference.text),
        )
        for overlap, reference, anchors, share in zip(overlaps, references, of_references, shares, strict=True)
    ]


def _references(
    problems: Sequence[Problem], keys: Sequence[int], *, settings: "RevealSettings", peers: Sequence[Peer] | None
) -> list[_Reference]:
    """Returns the reference of each rollout."""
    setting = f"objective.reveal.solution: {settings.solution}"
    match settings.solution:
        case "own" | "none" | "reference_free":
            return [_Reference(problem.reference, problem.domain) for problem in problems]
        case "wrong":
            others = [problems[index] for index in _partners(problems, keys, setting=setting)]
            return [_Reference(other.reference, other.domain, of=other.id) for other in others]
        case "other_example":
            # Two problems with the same text have the same solution, so neither can be the other's example.
            texts = [" ".join(problem.problem.split()) for problem in problems]
            others = [problems[index] for index in _partners(problems, keys, setting=setting, names=texts)]
            return [_Reference(other.reference, other.domain, of=other.id, example=other.problem) for other in others]
        case "peer_rollout":
            if peers is None:
                raise ValueError("peers: got None; solution=peer_rollout shows a response for each rollout")
            return [
                _Reference(peer.text, problem.domain, peer=peer.sample_index)
                for problem, peer in zip(problems, peers, strict=True)
            ]
        case unknown:
            raise UserError(f"objective.reveal.solution: {unknown!r} is not known to this version")


def anchors_of(domain: str, domains: Mapping[str, DomainSettings], *, default: str) -> str:
    """Returns the name of a domain's anchor extractor. default: objective.reveal.anchors."""
    return domain_of(domains, domain).anchors or default


def check_extractors(problems: Sequence[Problem], domains: Mapping[str, DomainSettings], *, default: str) -> None:
    """Raises UserError if the problems need an anchor extractor that does not exist. default: as in `anchors_of`."""
    for domain in dict.fromkeys(problem.domain for problem in problems):
        own = domain_of(domains, domain).anchors is not None
        setting = f"domains.{domain}.anchors" if own else "objective.reveal.anchors"
        extractor_named(anchors_of(domain, domains, default=default), setting=setting)


def limit_hidden(reveal: Reveal, surprise: Sequence[float], *, settings: "RevealSettings", offsets: Offsets) -> Reveal:
    """Shows more of the reference if the hidden part surprises the teacher by more than `settings.hidden_nats`.

    surprise: minus the log-probability of each token of the reference, in nats. The teacher that scores them is shown
    what the reveal shows. The result shows the fewest tokens for which the surprise of the hidden rest is within the
    limit. The cut follows the usual rules. With `hide_answer`, everything except the last box may be shown if nothing
    less is enough. The idea is ours: a teacher cannot teach what it cannot write.
    """
    if len(surprise) != reveal.total_tokens:
        raise ValueError(f"surprise: got {len(surprise)} values for a reference of {reveal.total_tokens} tokens")
    rest = [0.0, *accumulate(reversed(surprise))][::-1]  # rest[n]: surprise of what is hidden if n tokens are shown
    hidden = rest[reveal.shown_tokens]
    if hidden <= settings.hidden_nats:
        return dataclasses.replace(reveal, hidden_nats=hidden)

    def cut_at(kept: int) -> Reveal:
        return _cut(reveal, kept / len(surprise), settings=settings, offsets=offsets)

    # A later cut never shows less, so bisection finds the first one that is enough.
    kept = range(reveal.shown_tokens + 1, len(rest))
    enough = bisect_left(kept, True, key=lambda count: rest[cut_at(count).shown_tokens] <= settings.hidden_nats)
    return dataclasses.replace(cut_at(kept[min(enough, len(kept) - 1)]), hidden_nats=hidden)


def _uncut(overlap: Overlap, reference: _Reference, settings: "RevealSettings", anchors: str) -> Reveal:
    """Returns the reveal of a reference before it is cut. anchors: the extractor whose rules will place the cut."""
    return Reveal(
        overlap=overlap,
        share=1.0,
        shown_tokens=0,
        total_tokens=0,
        shown_text="",
        reference=reference.text,
        anchors=anchors,
        solution=settings.solution,
        view=settings.view,
        of=reference.of,
        example=reference.example,
        peer=reference.peer,
    )


def _cut(reveal: Reveal, share: float, *, settings: "RevealSettings", offsets: Offsets) -> Reveal:
    """Returns the reveal with another share of its reference shown."""
    reference = reveal.reference
    shown = cut_solution(
        reference,
        share=share,
        offsets=offsets,
        unit=settings.unit,
        hide_answer=settings.hide_answer,
        parts=extractor_named(reveal.anchors).parts,
    )
    complete = len(shown) == len(reference)
    return dataclasses.replace(
        reveal,
        share=share,
        shown_tokens=len(offsets) if complete else sum(start < len(shown) for start, _ in offsets),
        total_tokens=len(offsets),
        shown_text=shown,
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


def _partners(
    problems: Sequence[Problem], keys: Sequence[int], *, setting: str, names: Sequence[str] | None = None
) -> list[int]:
    """Returns for each rollout the index of a rollout of another problem, drawn by a key of the complete step.

    The n-th rollout of a problem gets the n-th rollout of its partner problem. So every rollout is used once if all
    problems have equally many. The order of the problems has no influence. names: what tells problems apart, for each
    rollout; None: their ids.
    """
    rollouts_of: dict[str, list[int]] = {}
    for index, name in enumerate(names or [problem.id for problem in problems]):
        rollouts_of.setdefault(name, []).append(index)
    ids = sorted(rollouts_of)
    if len(ids) < 2:
        raise UserError(
            f"{setting} takes another problem of the same step, and this step has {len(ids)} problem;"
            " set data.problems_per_step to 2 or more"
        )
    partner_of = derangement(derive_key(setting, *sorted(keys)), len(ids))
    partners = [0] * len(problems)
    for mine, other in zip(ids, partner_of, strict=True):
        theirs = rollouts_of[ids[other]]
        for number, index in enumerate(rollouts_of[mine]):
            partners[index] = theirs[number % len(theirs)]
    return partners
