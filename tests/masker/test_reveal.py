"""The reveal: its direction and limits, where a solution may be cut, and every rule over a whole step."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derive_key
from megatron_paint.config.settings import RevealSettings
from megatron_paint.masker.latex import alignments, boxes, math_spans
from megatron_paint.masker.overlap import MaskerPool, measure_overlap
from megatron_paint.masker.reveal import cut_solution, inverted_share, limit_hidden, reveal_share, reveal_step
from megatron_paint.records import Overlap, Problem, Reveal

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")


def characters(text):
    """Offsets of a tokenizer whose tokens are single characters."""
    return [(index, index + 1) for index in range(len(text))]


def words(text):
    """Offsets of a tokenizer whose tokens are words with the space before them."""
    starts = [0, *(index for index, letter in enumerate(text) if letter == " ")]
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def cut(text, share, offsets=characters, **options):
    return cut_solution(text, share=share, offsets=offsets(text), **options)


class TestShare:
    def test_values(self):
        # r = r_min + (1 - r_min) (1 - o)
        assert reveal_share(0.0, minimum=0.3) == 1.0
        assert reveal_share(1.0, minimum=0.3) == 0.3
        assert reveal_share(0.5, minimum=0.3) == pytest.approx(0.65, abs=1e-15)
        assert inverted_share(0.0, minimum=0.3) == 0.3
        assert inverted_share(1.0, minimum=0.3) == 1.0
        assert inverted_share(0.5, minimum=0.3) == pytest.approx(0.65, abs=1e-15)

    @given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
    def test_a_higher_overlap_hides_more(self, one, other, minimum):
        low, high = sorted((one, other))
        assert reveal_share(high, minimum=minimum) <= reveal_share(low, minimum=minimum)
        assert inverted_share(high, minimum=minimum) >= inverted_share(low, minimum=minimum)
        for share in (reveal_share(one, minimum=minimum), inverted_share(one, minimum=minimum)):
            assert minimum <= share <= 1

    @given(st.floats(0, 1))
    def test_ends_are_exact(self, minimum):
        assert reveal_share(0, minimum=minimum) == inverted_share(1, minimum=minimum) == 1.0
        assert reveal_share(1, minimum=minimum) == inverted_share(0, minimum=minimum) == minimum


class TestCut:
    def test_whole_solution_is_untouched(self):
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

    def test_a_box_around_a_span_is_left_whole(self):
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
        assert cut(text, kept / len(text)) == "So:"  # no row end yet: the whole span is hidden

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
        assert cut(text, 64 / len(text)) == "x" * 30  # no row in the span: it is hidden whole

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

    pieces = st.sampled_from(
        [
            *"ab. \n$}",
            *("\\[", "\\]", "\\boxed{", "\\\\", "\\begin{align}", "\\end{align}", "x=1"),
            *("word ", "End. ", "\u00e9", "\U0001f600", "e\u0301", "\ud800"),
        ]
    )

    @settings(max_examples=500, deadline=None)
    @given(
        st.lists(pieces, max_size=50).map("".join),
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


def step_of(count, samples=1):
    problems = [
        Problem(
            id=f"p{index}",
            problem=f"Problem {index}",
            solution=f"First we find $a_{index} = {index + 30}$ here. Then $b_{index} = {index + 60}$."
            f" So \\boxed{{{index + 90}}}.",
            answer=str(index + 90),
        )
        for index in range(count)
        for _ in range(samples)
    ]
    # The n-th rollout reproduces 0, 2, 4 or all 5 of: a box, two formulas, two numbers.
    anchors = [
        [f"a_{i} = {i + 30}", f"b_{i} = {i + 60}", f"\\boxed{{{i + 90}}}"] for i in (int(p.id[1:]) for p in problems)
    ]
    rollouts = ["; ".join(parts[: index % 4]) for index, parts in enumerate(anchors)]
    keys = [derive_key(1, 5, problem.id, index % samples) for index, problem in enumerate(problems)]
    return problems, rollouts, keys


def run(problems, rollouts, keys, pool=None, **options):
    return reveal_step(
        problems, rollouts, settings=RevealSettings(**options), keys=keys, token_offsets=words, pool=pool
    )


class TestStep:
    def test_overlap_rule(self):
        problems, rollouts, keys = step_of(8)
        for problem, rollout, reveal in zip(problems, rollouts, run(problems, rollouts, keys), strict=True):
            overlap = measure_overlap(problem=problem.problem, solution=problem.solution, rollout=rollout)
            assert reveal.overlap == overlap
            assert reveal.share == 0.3 + 0.7 * (1 - overlap.score) or overlap.score == 0
            assert reveal.reference == problem.solution
            assert reveal.shown_text == cut(problem.solution, reveal.share, words)
            assert reveal.total_tokens == problem.solution.count(" ") + 1
            assert reveal.shown_tokens == reveal.shown_text.count(" ") + 1

    def test_the_better_a_rollout_the_less_is_shown(self):
        problems, rollouts, keys = step_of(4)
        reveals = sorted(run(problems, rollouts, keys), key=lambda reveal: reveal.overlap.score)
        shown = [reveal.shown_tokens for reveal in reveals]
        assert [round(reveal.overlap.score, 2) for reveal in reveals] == [0, 0.4, 0.8, 1]
        assert shown == sorted(shown, reverse=True)
        assert len(set(shown)) == 4

    def test_everything_is_shown_to_a_rollout_without_overlap(self):
        problems, _, keys = step_of(3)
        for reveal, problem in zip(run(problems, ["", "no", "?"], keys), problems, strict=True):
            assert reveal.share == 1.0
            assert reveal.shown_text == problem.solution
            assert reveal.shown_tokens == reveal.total_tokens

    def test_full(self):
        problems, rollouts, keys = step_of(5)
        reveals = run(problems, rollouts, keys, rule="full")
        assert [reveal.shown_text for reveal in reveals] == [problem.solution for problem in problems]
        assert {reveal.share for reveal in reveals} == {1.0}
        assert [r.overlap for r in reveals] == [r.overlap for r in run(problems, rollouts, keys)]

    def test_fixed(self):
        problems, rollouts, keys = step_of(5)
        assert {reveal.share for reveal in run(problems, rollouts, keys, rule="fixed", share=0.4)} == {0.4}
        with pytest.raises(UserError, match=r"objective\.reveal\.share is null"):
            run(problems, rollouts, keys, rule="fixed")

    def test_inverted(self):
        problems, rollouts, keys = step_of(4)
        for reveal in run(problems, rollouts, keys, rule="inverted"):
            assert reveal.share == inverted_share(reveal.overlap.score, minimum=0.3)

    def test_random_is_keyed_and_uniform(self):
        problems, rollouts, keys = step_of(400)
        shares = [reveal.share for reveal in run(problems, rollouts, keys, rule="random", minimum=0.2)]
        alone = run(problems[7:8], rollouts[7:8], keys[7:8], rule="random", minimum=0.2)
        assert alone[0].share == shares[7]
        assert 0.2 <= min(shares) < 0.21
        assert 0.99 < max(shares) < 1
        assert abs(sum(shares) / 400 - 0.6) < 0.05  # four standard errors of 0.8 * sqrt(1 / 12 / 400)

    @pytest.mark.parametrize("samples", [1, 3])
    def test_shuffled_has_the_same_shares_at_other_problems(self, samples):
        problems, rollouts, keys = step_of(7, samples)
        own = [reveal.share for reveal in run(problems, rollouts, keys)]
        marked = [f"{rollout} {index}" for index, rollout in enumerate(rollouts)]
        shuffled = [reveal.share for reveal in run(problems, marked, keys, rule="shuffled")]
        assert sorted(shuffled) == sorted(own)
        assert shuffled != own

    def test_shuffled_never_takes_the_problems_own(self):
        # One rollout with overlap, so its share marks where it goes.
        problems, _, keys = step_of(6)
        for index in range(6):
            rollouts = [problem.solution if place == index else "" for place, problem in enumerate(problems)]
            reveals = run(problems, rollouts, keys, rule="shuffled")
            marked = [place for place, reveal in enumerate(reveals) if reveal.share != 1.0]
            assert len(marked) == 1
            assert marked != [index]

    def test_pairs_do_not_depend_on_the_order_of_the_step(self):
        problems, rollouts, keys = step_of(9)
        for options in ({"rule": "shuffled"}, {"solution": "wrong"}):
            forward = run(problems, rollouts, keys, **options)
            backward = run(problems[::-1], rollouts[::-1], keys[::-1], **options)
            assert forward == backward[::-1]
            other_key = run(problems, rollouts, [key + 1 for key in keys], **options)
            assert forward != other_key

    def test_wrong_shows_and_measures_another_problems_solution(self):
        problems, rollouts, keys = step_of(6)
        reveals = run(problems, rollouts, keys, solution="wrong")
        assert sorted(reveal.reference for reveal in reveals) == sorted(problem.solution for problem in problems)
        for problem, rollout, reveal in zip(problems, rollouts, reveals, strict=True):
            assert reveal.reference != problem.solution
            assert reveal.overlap == measure_overlap(
                problem=problem.problem, solution=reveal.reference, rollout=rollout
            )
            assert reveal.reference.startswith(reveal.shown_text)

    def test_none_shows_nothing_but_measures(self):
        problems, rollouts, keys = step_of(4)
        reveals = run(problems, rollouts, keys, solution="none")
        assert {(r.share, r.shown_tokens, r.total_tokens, r.shown_text, r.reference) for r in reveals} == {
            (0.0, 0, 0, "", "")
        }
        assert [r.overlap for r in reveals] == [r.overlap for r in run(problems, rollouts, keys)]

    @pytest.mark.parametrize("options", [{"rule": "shuffled"}, {"solution": "wrong"}])
    def test_one_problem_has_no_partner(self, options):
        problems, rollouts, keys = step_of(1, samples=4)
        with pytest.raises(
            UserError, match=r"another problem of the same step, and this step has 1.*problems_per_step"
        ):
            run(problems, rollouts, keys, **options)

    def test_lengths_must_agree(self):
        problems, rollouts, keys = step_of(3)
        with pytest.raises(ValueError, match="zip"):
            run(problems, rollouts[:2], keys)

    @pytest.mark.parametrize("options", [{}, {"rule": "shuffled"}, {"solution": "wrong", "unit": "segment"}])
    def test_pool_equals_serial(self, options):
        problems, rollouts, keys = step_of(24)
        with MaskerPool(2, from_characters=0) as pool:
            assert run(problems, rollouts, keys, pool, **options) == run(problems, rollouts, keys, **options)


@needs_data
def test_real_solutions_are_cut_well():
    """Over real solutions: never inside math unless at a row end, and rarely far from what was asked for."""
    lines = (DATA / "math_train.jsonl").read_text(encoding="utf-8").splitlines()[::5]
    far = 0
    for number, row in enumerate(map(json.loads, lines)):
        solution = row["solution"]
        share = 0.3 + 0.6 * (number % 7) / 7
        shown = cut(solution, share)
        assert solution.startswith(shown)
        far += len(shown) < 0.5 * share * len(solution)
    assert far < 0.2 * len(lines)


class TestLimitHidden:
    TEXT = "abcdefghij"

    def limited(self, surprise, limit, *, shown=4, text=TEXT, **options):
        reveal = Reveal(
            overlap=Overlap(score=1.0, anchors=()),
            share=shown / len(text),
            shown_tokens=shown,
            total_tokens=len(text),
            shown_text=text[:shown],
            reference=text,
        )
        made = RevealSettings(hidden_nats=limit, **options)
        return limit_hidden(reveal, surprise, settings=made, offsets=characters(text))

    def test_within_the_limit_nothing_changes(self):
        surprise = [9.0] * 4 + [0.0, 0.25, 0.0, 0.25, 0.0, 0.0]
        reveal = self.limited(surprise, 0.5)
        assert (reveal.shown_text, reveal.share, reveal.hidden_nats) == ("abcd", 0.4, 0.5)

    @pytest.mark.parametrize(
        ("limit", "shown"), [(0.49, "abcdef"), (0.25, "abcdef"), (0.2, "abcdefgh"), (1e-9, "abcdefgh"), (0.5, "abcd")]
    )
    def test_more_is_shown_up_to_what_surprises(self, limit, shown):
        """0.25 nats at f and at h: whoever hides both hides 0.5."""
        reveal = self.limited([9.0] * 4 + [0.0, 0.25, 0.0, 0.25, 0.0, 0.0], limit)
        assert reveal.shown_text == shown
        assert reveal.share == len(shown) / 10
        assert reveal.hidden_nats == 0.5

    def test_a_teacher_that_knows_nothing_is_shown_everything(self):
        reveal = self.limited([5.0] * 10, 0.5, shown=3)
        assert (reveal.shown_text, reveal.shown_tokens, reveal.share) == (self.TEXT, 10, 1.0)

    def test_the_new_cut_backs_off_as_any_other(self):
        text = "We say ab. And so"
        reveal = self.limited([0.0] * 9 + [1.0] + [0.0] * 7, 0.5, text=text)
        assert reveal.shown_text == "We say ab."
        assert reveal.share == 10 / 17

    @pytest.mark.parametrize(
        ("text", "surprising", "shown"),
        [
            ("Adding them gives $a+b=17$. So the answer is it.", "17", "Adding them gives $a+b=17$"),
            ("Adding them gives it. So it is \\boxed{17}.", "17", "Adding them gives it. So it is \\boxed{17}"),
            ("We say ab. And so", " ", "We say ab. A"),
        ],
    )
    def test_the_limit_holds_for_what_is_shown_in_the_end(self, text, surprising, shown):
        """A cut that backs off in front of what surprises would hide it again."""
        at = text.rindex(surprising, 0, text.index("A", 1) if surprising == " " else None)
        reveal = self.limited([0.0] * at + [5.0] + [0.0] * (len(text) - at - 1), 0.5, text=text)
        assert reveal.shown_text == shown
        assert reveal.shown_tokens > at

    @settings(max_examples=300, deadline=None)
    @given(st.lists(TestCut.pieces, min_size=1, max_size=40).map("".join), st.data())
    def test_any_text_shows_the_least_that_keeps_the_limit(self, text, data):
        surprise = data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=len(text), max_size=len(text)))
        cuts = [cut(text, kept / len(text)) for kept in range(1, len(text) + 1)]
        enough = [shown for shown in cuts if sum(surprise[len(shown) :]) <= 0.5]
        reveal = self.limited(surprise, 0.5, text=text, shown=0)
        assert reveal.shown_text == ("" if sum(surprise) <= 0.5 else enough[0])

    def test_a_hidden_answer_stays_hidden(self):
        text = "So it is \\boxed{17}."
        reveal = self.limited([5.0] * len(text), 0.5, text=text, hide_answer=True)
        assert reveal.shown_text == "So it is"

    def test_as_many_values_as_tokens(self):
        with pytest.raises(ValueError, match="got 3 values for a reference of 10 tokens"):
            self.limited([1.0] * 3, 0.5)
