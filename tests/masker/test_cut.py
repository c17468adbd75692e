"""Where a solution may be cut: tokens, sentence ends, math spans, boxes, characters."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.masker.cut import cut_solution
from megatron_paint.masker.latex import alignments, boxes, math_spans
from tests.masker.cutting import PIECES, cut, words

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")


class TestCut:
    def test_a_complete_solution_is_untouched(self):
        text = "  One. \n\n Two $x=1 \\boxed{ \n"
        assert cut(text, 1.0) == text

    def test_first_ceil_of_the_tokens(self):
        text = "one two three four five six seven eight nine ten"
        assert cut(text, 0.3, words) == "one two three"
        assert cut(text, 0.31, words) == "one two three four"
        assert cut(text, 0.3 + 1e-12, words) == "one two three"  # 1e-9 against rounding
        assert cut(text, 0.1, words) == "one"
        assert cut(text, 0.0, words) == ""
        assert cut(text, 0.95, words) == text

    def test_a_share_that_rounds_to_all_hides_nothing(self):
        assert cut("one two three ", 0.76, words) == "one two three "

    def test_backs_off_to_a_sentence_end_in_the_last_15_percent(self):
        text = "a" * 50 + " end. Next sentence goes on and on for a long while"
        assert text[54] == "."
        assert cut(text, 60 / len(text)) == text[:55]  # 55 >= 0.85 * 60
        assert cut(text, 64 / len(text)) == text[:55]  # 54.4
        assert cut(text, 65 / len(text)) == text[:65].rstrip()  # 55.25
        assert cut(text, 55 / len(text)) == text[:55]
        assert cut(text, 54 / len(text)) == text[:54]

    def test_backs_off_to_a_line_end(self):
        text = "a" * 20 + "\n" + "b" * 20
        assert cut(text, 22 / len(text)) == "a" * 20
        assert cut(text, 0.9) == "a" * 20 + "\n" + "b" * 16

    def test_a_decimal_point_is_no_sentence_end(self):
        text = "it is 3.14159 metres and more"
        assert cut(text, 10 / len(text)) == text[:10]

    def test_a_sentence_end_may_close_brackets_and_math(self):
        for end in ("(so.) ", '"so!" ', "$x.$ ", "so\u3002"):
            text = "a" * 50 + " " + end + "b" * 50
            assert cut(text, 60 / len(text)) == ("a" * 50 + " " + end).rstrip()

    def test_never_inside_a_math_span(self):
        text = "Take first this $x + y = z$ and then more words"
        start, end = text.index("$"), text.rindex("$") + 1
        for kept in range(start + 1, end):
            assert cut(text, kept / len(text)) == "Take first this"
        assert cut(text, end / len(text)) == text[:end]

    def test_never_inside_a_box(self):
        text = "Take all of this as \\boxed{a {b} c} then more"
        for kept in range(text.index("\\") + 1, text.index(" then")):
            assert cut(text, kept / len(text)) == "Take all of this as"

    def test_a_box_around_a_span_is_hidden_with_it(self):
        text = "Take all of this as \\boxed{we have $x=y$ so} then"
        kept = text.index("=") + 1
        assert cut(text, kept / len(text)) == "Take all of this as"

    def test_a_long_span_is_cut_at_its_last_row(self):
        rows = "\\begin{align*} a &= b + c + d \\\\ e &= f + g + h \\\\ i &= j + k \\end{align*}"
        text = "So: " + rows + " end"
        kept = text.index("k")
        assert cut(text, kept / len(text)) == "So: \\begin{align*} a &= b + c + d \\\\ e &= f + g + h"
        kept = text.index("h")
        assert cut(text, kept / len(text)) == "So: \\begin{align*} a &= b + c + d"
        kept = text.index("d")
        assert cut(text, kept / len(text)) == "So:"  # no row end yet: the complete span is hidden

    def test_a_long_span_is_cut_at_its_last_line(self):
        text = "So: \\[\na = b + c + d\n= e + f + g\n= h\n\\] end"
        kept = text.index("f")
        assert cut(text, kept / len(text)) == "So: \\[\na = b + c + d"
        kept = text.index("a =") + 1
        assert cut(text, kept / len(text)) == "So:"

    def test_rows_inside_a_box_are_no_cut(self):
        text = "So: \\[ \\boxed{ a = b \\\\ c = d + e + f + g } + h \\] end"
        kept = text.index("f")
        assert cut(text, kept / len(text)) == "So:"

    def test_short_prefix_before_a_span_stays(self):
        text = "x" * 30 + " $" + "y" * 60 + "$ end"
        assert cut(text, 62 / len(text)) == "x" * 30  # 31 of 62 is not less than half
        assert cut(text, 64 / len(text)) == "x" * 30  # no row in the span: the complete span is hidden

    def test_never_inside_a_character(self):
        text = "abc \u00e9\U0001f600 def"
        bytes_of_emoji = [(5, 6)] * 4  # a byte-level token per byte, all with the character's offsets
        offsets = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), *bytes_of_emoji, (6, 7), (7, 8), (8, 9), (9, 10)]
        shown = [cut_solution(text, share=kept / 13, offsets=offsets) for kept in range(5, 11)]
        assert shown == ["abc \u00e9"] * 4 + ["abc \u00e9\U0001f600"] * 2

    @pytest.mark.parametrize(
        "character", ["e\u0301", "\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "\U0001f44d\U0001f3fd"]
    )
    def test_never_inside_a_composed_character(self, character):
        text = f"abcdef{character}ghi"
        for kept in range(6, 6 + len(character)):
            assert cut(text, kept / len(text)) == "abcdef"

    def test_hide_answer_ends_before_the_last_box(self):
        text = "First \\boxed{1}. We get to the point where it is \\boxed{12}."
        assert cut(text, 1.0, hide_answer=True) == "First \\boxed{1}. We get to the point where it is"
        assert cut(text, 0.4, hide_answer=True) == cut(text, 0.4)
        assert cut("No box. At all", 1.0, hide_answer=True) == "No box. At all"

    def test_hide_answer_hides_the_span_of_the_box(self):
        text = "We get to the point where $x = \\boxed{12}$."
        assert cut(text, 1.0, hide_answer=True) == "We get to the point where"

    def test_hide_answer_takes_the_outermost_box(self):
        assert cut("It is so that \\boxed{a = \\boxed{5}}.", 1.0, hide_answer=True) == "It is so that"

    def test_segments(self):
        text = "One. Two $a.\\ b$ still two.\nThree\n\nFour \\boxed{5}. "
        expected = ["", "One.", "One. Two $a.\\ b$ still two.", "One. Two $a.\\ b$ still two.\nThree", text]
        for kept, shown in enumerate(expected):
            assert cut(text, kept / 4, unit="segment") == shown
        assert cut(text, 0.26, unit="segment") == expected[2]
        assert cut(text, 1.0, unit="segment", hide_answer=True) == expected[3]

    @settings(max_examples=500, deadline=None)
    @given(
        st.lists(PIECES, max_size=50).map("".join),
        st.floats(0, 1),
        st.sampled_from(["token", "segment"]),
        st.booleans(),
    )
    def test_any_text_gives_a_prefix_that_ends_well(self, text, share, unit, hide_answer):
        shown = cut(text, share, unit=unit, hide_answer=hide_answer)
        assert text.startswith(shown)
        if unit == "token":
            assert len(shown) <= math.ceil(share * len(text) - 1e-9)
        if hide_answer and boxes(text):
            assert len(shown) <= max(boxes(text), key=lambda box: box.end).start
        if len(shown) < len(text):
            assert shown == shown.rstrip()
            end = len(shown)
            ends_a_row = text[end:].lstrip(" ").startswith(("\\\\", "\n"))
            if not ends_a_row:
                assert not any(span.start < end < span.end for span in math_spans(text, alignments(text)))


@needs_data
def test_real_solutions_are_cut_well():
    """Real solutions are cut to a prefix, and the prefix is rarely much shorter than requested."""
    lines = (DATA / "math_train.jsonl").read_text(encoding="utf-8").splitlines()[::5]
    far = 0
    for number, row in enumerate(map(json.loads, lines)):
        solution = row["solution"]
        share = 0.3 + 0.6 * (number % 7) / 7
        shown = cut(solution, share)
        assert solution.startswith(shown)
        far += len(shown) < 0.5 * share * len(solution)
    assert far < 0.2 * len(lines)
