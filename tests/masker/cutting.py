"""Cuts of a text by simple tokenizers, and random texts to cut."""

from hypothesis import strategies as st

from megatron_paint.masker.cut import cut_solution

PIECES = st.sampled_from(
    [
        *"ab. \n$}",
        *("\\[", "\\]", "\\boxed{", "\\\\", "\\begin{align}", "\\end{align}", "x=1"),
        *("word ", "End. ", "\u00e9", "\U0001f600", "e\u0301", "\ud800"),
    ]
)


def characters(text):
    """Offsets of a tokenizer whose tokens are single characters."""
    return [(index, index + 1) for index in range(len(text))]


def words(text):
    """Offsets of a tokenizer whose tokens are words with the space before them."""
    starts = [0, *(index for index, letter in enumerate(text) if letter == " ")]
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def cut(text, share, offsets=characters, **options):
    return cut_solution(text, share=share, offsets=offsets(text), **options)
