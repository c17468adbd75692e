"""The pieces of a response put together are the response, whatever the tokenizer does to single tokens."""

import pytest

from megatron_paint.report.token_texts import TokenTexts, length_in_browser

WORDS = {1: b"The", 2: b" sum", 3: b" is", 4: b" 17", 7: b"\xe2", 8: b"\x88", 9: b"\x91", 11: "\U0001f600".encode()}


def decode(ids):
    return b"".join(WORDS[i] for i in ids).decode("utf-8", "replace")


def decode_words(ids):
    """As SentencePiece: the first space of a text is dropped."""
    return decode(ids).removeprefix(" ")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([1, 2, 3, 4], [("The", 1), (" sum", 1), (" is", 1), (" 17", 1)]),
        ([2, 7, 8, 9, 4], [(" sum", 1), ("\u2211", 3), (" 17", 1)]),
        ([1, 7, 8], [("The", 1), ("\ufffd", 2)]),  # the response ends within a character
        ([1, 11], [("The", 1), ("\U0001f600", 1)]),
    ],
)
def test_pieces(ids, expected):
    found = TokenTexts(decode).pieces(ids, decode(ids))
    assert found == expected
    assert sum(count for _, count in found) == len(ids)


def test_a_tokenizer_that_drops_spaces():
    ids = [2, 3, 4, 4]
    assert TokenTexts(decode_words).pieces(ids, "sum is 17 17") == [("sum", 1), (" is", 1), (" 17", 1), (" 17", 1)]


def test_other_texts_have_no_pieces():
    assert TokenTexts(decode).pieces([1, 2], "Another text") is None


def test_lengths_are_those_of_a_browser():
    assert [length_in_browser(text) for text in ("", "ab", "\u2211", "\U0001f600", "a\ud800")] == [0, 2, 1, 2, 2]
