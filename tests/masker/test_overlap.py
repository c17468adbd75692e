"""The overlap score: every rule of anchors, normalisation and matching worked by hand, and safety on any text."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_paint.base.errors import UserError
from megatron_paint.masker import anchors
from megatron_paint.masker import overlap as overlap_module
from megatron_paint.masker.anchors import flatten, normalise
from megatron_paint.masker.latex import alignments, boxes, math_spans
from megatron_paint.masker.overlap import (
    EXTRACTORS,
    AnchorExtractor,
    MaskerPool,
    Pair,
    measure_overlap,
    measure_overlaps,
    register_extractor,
)
from megatron_paint.masker.substring import _standing_in_long, _stands_in, standing_in

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")


def anchors_of(solution, problem=""):
    measured = measure_overlap(problem=problem, solution=solution, rollout="")
    return [(anchor.kind, anchor.text) for anchor in measured.anchors]


def is_found(anchor, rollout):
    """Whether the one formula or number of a solution is found in a rollout."""
    measured = measure_overlap(problem="", solution=anchor, rollout=rollout)
    assert len(measured.anchors) == 1, measured.anchors
    return measured.anchors[0].found


def texts(kind, solution, problem=""):
    return [text for found_kind, text in anchors_of(solution, problem) if found_kind == kind]


def test_score_is_the_share_of_anchors_found():
    measured = measure_overlap(
        problem="Solve $3x = 36$.",
        solution="Divide: $x = 36/3$. So $x = 12$, that is \\boxed{12}, not 17.",
        rollout="We have x=36/3 and thus \\boxed{12}.",
    )
    # The number 36 stands in the problem; 12 is the box; 36/3 is a number, x=36/3 a formula.
    assert [(a.kind, a.text, a.found) for a in measured.anchors] == [
        ("boxed", "12", True),
        ("formula", "x=36/3", True),
        ("formula", "x=12", False),
        ("number", "36/3", True),
        ("number", "17", False),
    ]
    assert measured.score == 3 / 5


def test_no_anchor_is_score_zero():
    assert measure_overlap(problem="", solution="By symmetry.", rollout="By symmetry.").score == 0
    assert measure_overlap(problem="", solution="", rollout="").anchors == ()


class TestBoxes:
    @pytest.mark.parametrize(
        ("solution", "expected"),
        [
            (r"\boxed{12}", ["12"]),
            (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
            (r"\boxed {7}", ["7"]),
            (r"\boxed{a} and \boxed{b}", ["a", "b"]),
            (r"\boxed{x = \boxed{3}}", ["x=3", "3"]),
            (r"\boxed{\{1,5\}}", [r"\{1,5\}"]),
            (r"\boxed{5", []),
            (r"\boxed{\boxed{5}", ["5"]),
            (r"\boxed{}", []),
            (r"\boxed{ }", []),
            (r"\boxed 5", []),
            (r"\boxed{5}} and }{ \boxed{6}", ["5", "6"]),
            (r"\boxed{5} and \boxed{5}", ["5"]),
            (r"\boxed{81, 256}", ["81,256"]),
            (r"\boxed{5 12}", ["512"]),
        ],
    )
    def test_content(self, solution, expected):
        assert texts("boxed", solution) == expected

    def test_trivial_and_given_numbers_count_in_a_box(self):
        assert anchors_of(r"\boxed{2}") == [("boxed", "2")]
        assert anchors_of(r"\boxed{2024}", problem="In 2024") == [("boxed", "2024")]

    @pytest.mark.parametrize("content", ["12345", "12,345", "12{,}345", r"12\,345", r"12,\!345"])
    def test_number_follows_the_number_rule(self, content):
        solution = rf"\boxed{{{content}}}"
        assert anchors_of(solution) == [("boxed", "12345")]
        assert measure_overlap(problem="", solution=solution, rollout="the sum is 12,345.").score == 1
        assert measure_overlap(problem="", solution=solution, rollout="the sum is 112,345.").score == 0

    def test_a_box_with_white_space_between_digits_is_no_number(self):
        assert measure_overlap(problem="", solution=r"\boxed{81, 256}", rollout="81,256 or 81256").score == 1
        assert measure_overlap(problem="", solution=r"\boxed{81, 256}", rollout="81256").score == 0

    def test_percentage(self):
        solution = r"\boxed{18\%}"
        assert anchors_of(solution) == [("boxed", "18%")]
        assert measure_overlap(problem="", solution=solution, rollout=r"It is $18\%$.").score == 1
        assert measure_overlap(problem="", solution=solution, rollout="It is 18.").score == 0

    def test_a_signed_box_is_a_passage(self):
        solution = r"\boxed{-5}"
        assert measure_overlap(problem="", solution=solution, rollout="x=-5").score == 1
        assert measure_overlap(problem="", solution=solution, rollout="x=3-5").score == 0
        assert measure_overlap(problem="", solution=solution, rollout="x=-51").score == 0

    def test_letters(self):
        assert is_found(r"\boxed{B}", "the answer is (B).")
        assert not is_found(r"\boxed{B}", "By symmetry")


class TestFormulas:
    @pytest.mark.parametrize(
        "solution",
        [
            "$a = b$",
            "$$a = b$$",
            r"\(a = b\)",
            r"\[a = b\]",
            r"\begin{align}a = b\end{align}",
            r"\begin{align*}a &= b\end{align*}",
            r"$\begin{aligned}a &= b\end{aligned}$",
            r"\begin{equation}a = b\end{equation}",
            r"\begin{gather*}a = b\end{gather*}",
        ],
    )
    def test_every_kind_of_span(self, solution):
        assert anchors_of(solution) == [("formula", "a=b")]

    @pytest.mark.parametrize(
        "solution", ["a = b", "$a = b", "$ab$", "$=b$", "$abc$", r"$\alpha\beta$", r"\begin{cases}a=b\end{cases}"]
    )
    def test_no_formula(self, solution):
        assert texts("formula", solution) == []

    @pytest.mark.parametrize("operator", ["+", "-", "*", "/", "^", "_", "=", "<", ">", r"\le ", r"\neq ", r"\cdot "])
    def test_operators(self, operator):
        assert len(texts("formula", f"$a{operator}b$")) == 1

    def test_a_command_is_an_operator_only_as_a_whole(self):
        assert texts("formula", r"$\left(abc\right)$") == []
        assert texts("formula", r"$\infty\leftmark$") == []

    def test_rows(self):
        solution = (
            r"\begin{align*} a &= b \\[2pt] &= c + d \\ e &= \begin{pmatrix}1 & 5\\ 6 & 7\end{pmatrix} \end{align*}"
        )
        assert texts("formula", solution) == ["a=b", "=c+d", r"e=\begin{pmatrix}1&5\\6&7\end{pmatrix}"]

    def test_rows_of_an_alignment_inside_a_span(self):
        solution = r"\[ f(x) = \begin{aligned} a &= b \\ c &= d \end{aligned} \]"
        assert texts("formula", solution) == ["f(x)=", "a=b", "c=d"]

    def test_a_row_end_outside_alignments_does_not_split(self):
        assert texts("formula", r"\[a = b \\ c = d\]") == [r"a=b\\c=d"]

    def test_box_inside_is_unwrapped(self):
        assert anchors_of(r"$x = \boxed{y+1}$") == [("boxed", "y+1"), ("formula", "x=y+1")]

    def test_a_span_that_is_only_a_box_is_none(self):
        assert anchors_of(r"$\boxed{x=3y}.$") == [("boxed", "x=3y")]
        assert anchors_of(r"\begin{align} a&=b \\ \boxed{c=d} \end{align}") == [("boxed", "c=d"), ("formula", "a=b")]

    def test_a_formula_of_the_problem_is_dropped(self):
        assert texts("formula", "$x + y = 5$ and $x = 5 - y$", problem="Let $x+y=5$.") == ["x=5-y"]
        assert texts("formula", "$x+y=5$", problem="Let $x+y=55$.") == ["x+y=5"]

    def test_normalisation(self):
        assert texts("formula", r"$\displaystyle \left( \dfrac{a}{b} \right)\, +\! \tfrac cd\;\: \quad = e.$") == [
            r"(\frac{a}{b})+\fraccd=e"
        ]

    def test_a_lone_dollar_ends_with_its_paragraph(self):
        assert texts("formula", "It costs $5.\n\nThen $a=b$ holds.") == ["a=b"]

    def test_neighbouring_spans(self):
        assert texts("formula", "$a=b$$c=d$") == ["a=b", "c=d"]

    def test_escaped_dollar_is_currency(self):
        assert texts("formula", r"\$5 - \$3 and $a=b$") == ["a=b"]


class TestNumbers:
    @pytest.mark.parametrize(
        ("solution", "expected"),
        [
            ("12 and 3.75 and 18% and 18\\% and 5/7", ["12", "3.75", "18%", "5/7"]),
            ("0, 1 and 2", []),
            ("10, 1.0 and 22", ["10", "1.0", "22"]),
            ("-7 and +8", ["7", "8"]),
            ("12,345 and 12{,}346 and 12\\,347 and 1,234,567", ["12345", "12346", "12347", "1234567"]),
            ("3,45 and 3, 456", ["3", "45", "456"]),
            ("x^{10}=a_{11}", ["10", "11"]),
            (r"\frac{34}{56}", ["34", "56"]),
            (r"\frac34 and \dfrac56", ["3", "4", "5", "6"]),
            (".5 and 3..7", [".5", "3", "7"]),
            ("3/4/5", ["3/4", "5"]),
            ("1.5/3", ["1.5", "3"]),
            ("x3y", ["3"]),
            ("\u0663\u0664", ["34"]),  # Arabic digits
            (r"7 \boxed{8} 9", ["7", "9"]),
        ],
    )
    def test_kinds(self, solution, expected):
        assert texts("number", solution) == expected

    def test_numbers_of_the_problem_are_dropped(self):
        assert texts("number", "12, 13, 5/7 and 18%", problem="12 of 5/7 are 18%") == ["13"]
        assert texts("number", "5 and 7", problem="5/7") == []
        assert texts("number", "12", problem="1.12 and 112") == ["12"]
        assert texts("number", "1234", problem="1,234") == []

    def test_numbers_of_formulas_count(self):
        assert anchors_of("$x = 17$") == [("formula", "x=17"), ("number", "17")]

    @pytest.mark.parametrize("rollout", ["12", "x12y", "(12)", "12.", "12, 5", "=12$", "12/5", "5/12", "12%", "-12"])
    def test_found_on_digit_boundaries(self, rollout):
        assert is_found("12", rollout)

    @pytest.mark.parametrize("rollout", ["112", "1.12", "12.5", "1 2", "12,345", "120", ".12"])
    def test_not_found_inside_other_numbers(self, rollout):
        assert not is_found("12", rollout)

    def test_white_space_parts_numbers(self):
        assert not is_found("512", "5 12")
        assert is_found("12", "5 12")

    @pytest.mark.parametrize("written", ["12,345", "12{,}345", r"12\,345", "12345"])
    def test_thousands_separators_on_both_sides(self, written):
        for other in ("12,345", "12{,}345", r"12\,345", "12345"):
            assert is_found(written, other)

    def test_fractions(self):
        assert is_found("3/4", "x=3/4.")
        assert not is_found("3/4", "3/45")
        assert not is_found("3/4", "13/4")
        assert not is_found("3/4", "3 and 4")


class TestPriority:
    def test_box_wins_over_formula_wins_over_number(self):
        assert anchors_of(r"$x=3y$, $3/4$ and 3/4, \boxed{x=3y}, 17 is \boxed{17}") == [
            ("boxed", "x=3y"),
            ("boxed", "17"),
            ("formula", "3/4"),
            ("number", "3"),
        ]


class TestNeighbours:
    @pytest.mark.parametrize(
        "rollout",
        [
            "x=1",
            "so x=1.",
            "x = 1, y = 5",
            "(x=1)",
            "$x=1$",
            "so$x=1$we",  # math delimiters part
            r"so\(x=1\)we",
            "ax = 1; and a x = 1 b",  # white space parts
            "x=1\ny=2",
            r"\begin{align}x&=1\\y&=2\end{align}",
            r"x=\boxed{1}",
            r"x\,=\,1",
            r"2\cdot x=1",
            "x=1. 5 apples",
        ],
    )
    def test_found(self, rollout):
        assert is_found("$x=1$", rollout)

    @pytest.mark.parametrize("rollout", ["x=12", "x=1a", "2x=1", "ax=1", "x=1.5", "x=1,000", "x-1", "", "x=1\u00b2"])
    def test_not_found(self, rollout):
        assert not is_found("$x=1$", rollout)

    def test_any_occurrence_will_do(self):
        assert is_found("$x=1$", "x=12, ax=1, x=1")

    def test_a_decimal_before_is_part_of_a_number(self):
        assert not is_found("$2+x=y$", "3.2+x=y")
        assert is_found("$2+x=y$", "3. 2+x=y")

    def test_both_fraction_commands_match(self):
        assert is_found(r"$\dfrac{a}{b}$", r"it is \tfrac{a}{b}")

    def test_alignment_marks_do_not_part_a_formula(self):
        assert is_found("$a=b$", r"\begin{aligned} a &= b \end{aligned}")


def test_higher_overlap_means_more_of_the_solution_reproduced():
    solution = "First $a=b+17$. Then $c=d+18$. Then $e=f+19$. So \\boxed{20}."
    scores = [
        measure_overlap(problem="", solution=solution, rollout=solution[:length]).score
        for length in range(len(solution) + 1)
    ]
    assert scores == sorted(scores)
    assert scores[0] == 0
    assert scores[-1] == 1


def test_the_automaton_finds_what_plain_search_finds():
    rollout = "a+b=c; 2a+b = d, (a+b)^2=c x=1.5 x=1 aa+bb"
    normal = normalise(flatten(rollout))
    length = len(normal.text)
    pieces = {normal.text[i:j] for i in range(length) for j in range(i + 1, min(i + 9, length + 1))}
    passages = [*pieces, "zz", "a+c"]
    plain = {passage for passage in passages if _stands_in(normal, passage)}
    assert _standing_in_long(normal, passages) == plain == standing_in(normal, passages)
    assert 20 < len(plain) < len(pieces)


any_text = st.text(st.characters(), max_size=200)
LATEX = [
    *"x12.,{}$%&/=+ \n\\",
    *("\\boxed{", "\\frac", "\\[", "\\]", "\\(", "\\)", "$$", "\\\\", "\\left", "\\$", "{,}", "\\,", "345"),
    *("\\begin{align}", "\\end{align}", "\\begin{pmatrix}", "\\end{pmatrix}", "\u00e9", "\ud800"),
]
latex_text = st.lists(st.sampled_from(LATEX), max_size=60).map("".join)


class TestAnyText:
    @settings(max_examples=400, deadline=None)
    @given(any_text | latex_text, any_text | latex_text, any_text | latex_text)
    def test_never_raises_and_stays_in_range(self, problem, solution, rollout):
        measured = measure_overlap(problem=problem, solution=solution, rollout=rollout)
        assert 0 <= measured.score <= 1
        assert len({anchor.text for anchor in measured.anchors}) == len(measured.anchors)
        assert all(anchor.text for anchor in measured.anchors)

    @settings(max_examples=400, deadline=None)
    @given(st.text("12.,/%\\ a{}\u00e9\u0663\n", max_size=14))
    def test_numbers_are_those_that_one_pass_over_the_text_finds(self, text):
        expected = set()
        for number, denominator, percent in anchors._NUMBER.findall(anchors._tidy_numbers(text)):
            expected |= {number} | ({number + "%"} if percent else set())
            expected |= {f"{number}/{denominator}"} if denominator and "." not in number else set()
        assert anchors.numbers_in(text) == expected

    @settings(max_examples=400, deadline=None)
    @given(latex_text)
    def test_spans_are_ordered_and_in_range(self, text):
        spans = math_spans(text, alignments(text))
        edges = [edge for span in spans for edge in (span.start, span.content_start, span.content_end, span.end)]
        assert edges == sorted(edges)
        for box in boxes(text):
            assert text[box.start : box.content_start].startswith("\\boxed")
            assert text[box.content_end] == "}"
        assert len(flatten(text)) == len(text)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(latex_text, st.data())
    def test_automaton_equals_plain_search(self, text, data):
        normal = normalise(flatten(text))
        cut = st.integers(0, len(normal.text))
        ends = [sorted((data.draw(cut), data.draw(cut))) for _ in range(6)]
        passages = [normal.text[start:end] for start, end in ends if start < end]
        plain = {passage for passage in passages if _stands_in(normal, passage)}
        assert _standing_in_long(normal, passages) == plain


HOSTILE = {
    "unclosed boxes": "\\boxed{" * 14_000,
    "nested boxes": "\\boxed{1+" * 5_000 + "x" + "}" * 5_000,
    "open braces": "{" * 100_000,
    "dollars": "$" * 100_000,
    "display openers": "\\[" * 50_000,
    "row ends": "\\\\[" * 33_000,
    "unclosed alignments": "\\begin{align}" * 7_000,
    "nested alignments": "\\begin{equation}\\begin{aligned}a&=b\\\\" * 2_500 + "\\end{aligned}\\end{equation}" * 2_500,
    "backslashes": "\\" * 100_000,
    "digits": "1" * 100_000,
    "one fraction": "1/" * 50_000,
    "one thousand": "111," * 25_000,
    "paragraphs of lone dollars": "$x=1\n\n" * 14_000,
    "touching formulas": "$ax=1$" * 16_000,
    "no math": "word " * 20_000,
    "another script": "\u6211\u4eec\u5f97\u5230x=1\u3002" * 12_000,
    "lone surrogates": "\ud800$x=\ud801$" * 12_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_of_100k_characters(text):
    started = time.process_time()
    measured = measure_overlap(problem=text[:30_000], solution=text, rollout=text)
    assert 0 <= measured.score <= 1
    assert time.process_time() - started < 5


def test_time_is_linear_in_the_length():
    def seconds(repeats):
        unit = "We get $x_{%d} = %d + y$ and then \\[z = %d - a.\\] "
        text = "".join(unit % (7 * index, 11 * index, 13 * index) for index in range(repeats))
        best = []
        for attempt in range(5):
            started = time.process_time()
            measure_overlap(problem=str(attempt), solution=text, rollout=text)
            best.append(time.process_time() - started)
        return min(best)

    assert seconds(1600) < 4 * 8 * seconds(200)  # 8 times the text; a busy machine may make it 16, quadratic time 64


class TestPool:
    PAIRS = tuple(
        Pair("", f"$x_{index}={index}+y$ and \\boxed{{{index}}}", f"x_{index} = {index} + y" if index % 3 else "\ud800")
        for index in range(40)
    )

    def test_pool_equals_serial(self):
        serial = measure_overlaps(self.PAIRS)
        with MaskerPool(2, from_characters=0) as pool:
            assert measure_overlaps(self.PAIRS, pool=pool) == serial
            assert measure_overlaps(self.PAIRS[:1], pool=pool) == serial[:1]  # the workers are kept
        assert [overlap.score for overlap in serial[:2]] == [0.0, 1.0]

    def test_little_work_stays_in_the_process(self):
        pool = MaskerPool(2)
        assert measure_overlaps(self.PAIRS, pool=pool) == measure_overlaps(self.PAIRS)
        assert pool._executor is None

    def test_goes_on_alone_when_workers_die(self, monkeypatch):
        serial = measure_overlaps(self.PAIRS)
        with MaskerPool(1, from_characters=0) as pool:
            monkeypatch.setattr(overlap_module, "_chunks", lambda pairs, count: [pairs])
            monkeypatch.setattr(overlap_module, "ProcessPoolExecutor", _DeadExecutor)
            with pytest.warns(UserWarning, match="goes on in one process"):
                assert measure_overlaps(self.PAIRS, pool=pool) == serial
            assert measure_overlaps(self.PAIRS, pool=pool) == serial

    def test_needs_a_worker(self):
        with pytest.raises(UserError, match="at least 1"):
            MaskerPool(0)


class _DeadExecutor:
    def __init__(self, *_, **__):
        pass

    def map(self, *_):
        raise overlap_module.BrokenProcessPool("a worker died")

    def shutdown(self, **_):
        pass


class TestExtractors:
    def test_another_domain_plugs_in_by_name(self, monkeypatch):
        monkeypatch.setattr(overlap_module, "EXTRACTORS", dict(EXTRACTORS))
        register_extractor("words", AnchorExtractor(_words, _find_words))
        measured = measure_overlap(problem="", solution="use sort then search", rollout="sort it", anchors="words")
        assert measured.score == 1 / 4

    def test_unknown_name(self):
        with pytest.raises(UserError, match=r"objective\.reveal\.anchors.*'maths'.*math"):
            measure_overlap(problem="", solution="", rollout="", anchors="maths")


class _Word(str):
    kind = "formula"

    @property
    def text(self):
        return str(self)


def _words(problem, solution):
    return tuple(map(_Word, solution.split()))


def _find_words(words, rollout):
    return tuple(word in rollout.split() for word in words)


@needs_data
class TestRealData:
    @pytest.fixture(scope="class")
    def rows(self):
        lines = (DATA / "rollouts_qwen25math_math100x8.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def test_a_solution_reproduces_itself(self, rows):
        lines = (DATA / "math_train.jsonl").read_text(encoding="utf-8").splitlines()[::7]
        for row in map(json.loads, lines):
            measured = measure_overlap(problem=row["problem"], solution=row["solution"], rollout=row["solution"])
            assert all(anchor.found for anchor in measured.anchors), (row["id"], measured)
            assert measured.score == 1

    def test_right_rollouts_overlap_more(self, rows):
        means = {}
        for correct in (True, False):
            scores = [
                measure_overlap(problem=row["problem"], solution=row["solution"], rollout=row["rollout"]).score
                for row in rows
                if row["correct"] is correct
            ]
            means[correct] = sum(scores) / len(scores)
        assert means[True] > means[False] + 0.15

    def test_a_rollout_of_another_problem_overlaps_little(self, rows):
        shifted = rows[8:] + rows[:8]
        scores = [
            measure_overlap(problem=row["problem"], solution=row["solution"], rollout=other["rollout"]).score
            for row, other in zip(rows, shifted, strict=True)
        ]
        assert sum(scores) / len(scores) < 0.15
