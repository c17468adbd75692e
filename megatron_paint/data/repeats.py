"""Counts problems whose text another row has too. Nothing but hashes is kept: 16 bytes a problem."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.records import Problem

COMPARISON = "Texts are compared as they are, except that white space of any length counts as one space."


def repeats(problems: Sequence[Problem], *, setting: str) -> tuple[str, ...]:
    """Returns a warning with the number of problems that repeat an earlier text; nothing if there is none.

    It also counts those whose answer differs from that of the earlier problem. setting: where the problems are from.
    """
    texts = _hashes([problem.problem for problem in problems])
    first = _first_of_each(texts)
    repeated = np.flatnonzero(first != np.arange(len(problems)))
    if not len(repeated):
        return ()
    index = repeated[0]
    answers = _hashes([problem.answer for problem in problems])
    differing = repeated[answers[repeated] != answers[first[repeated]]]
    contradictions = ""
    if len(differing):
        one, other = problems[differing[0]], problems[first[differing[0]]]
        contradictions = (
            f" {len(differing)} of them {agreeing(len(differing), 'has', 'have')} another answer: the first is "
            f"{one.id!r} with {one.answer!r}, and {other.id!r} has {other.answer!r}."
        )
    different = len(problems) - len(repeated)
    return (
        f"{setting}: {len(repeated):,} of {len(problems):,} problems {agreeing(len(repeated), 'repeats', 'repeat')} "
        f"the text of an earlier one; {different:,} {agreeing(different, 'is', 'are')} different. The first is "
        f"{problems[index].id!r}, which repeats {problems[first[index]].id!r}.{contradictions} {COMPARISON}",
    )


def leaks(train: Sequence[Problem], held_out: Sequence[Problem]) -> tuple[str, ...]:
    """Returns a warning with the number of held-out problems that are trained on; nothing if there is none."""
    trained = _hashes([problem.problem for problem in train])
    evaluated = _hashes([problem.problem for problem in held_out])
    leaked = np.flatnonzero(np.isin(evaluated, trained))
    if not len(leaked):
        return ()
    index = leaked[0]
    twin = train[int(np.flatnonzero(trained == evaluated[index])[0])]
    return (
        f"evaluation.problems: {len(leaked):,} of {count_text(len(held_out), 'held-out problem')} "
        f"{agreeing(len(leaked), 'is', 'are')} also in data.train, so their accuracy is that of trained problems. The "
        f"first is {held_out[index].id!r}, which is {twin.id!r} in data.train. {COMPARISON}",
    )


def _hashes(texts: Sequence[str]) -> np.ndarray:
    """Returns a hash of 64 bits for each text. Two of a million different texts are equal with probability 3e-8."""
    hashes = (_hash(" ".join(text.split())) for text in texts)
    return np.fromiter(hashes, dtype=np.uint64, count=len(texts))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Returns for each place the first place with the same hash."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    return first[group]
