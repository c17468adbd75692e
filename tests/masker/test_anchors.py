"""Anchors: every rule of extraction, normalisation and matching, worked by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.masker import anchors
from megatron_paint.masker.overlap import measure_overlap


def anchors_of(solution, problem=""):
    measured = measure_overlap(problem=problem, solution=solution, rollout="")
    return [(anchor.kind, anchor.text) for anchor in measured.anchors]


def is_found(anchor, rollout):
    """Tells whether the only formula or number of a solution is found in a rollout."""
    measured = measure_overlap(problem="", solution=anchor, rollout=rollout)
    assert len(measured.anchors) == 1, measured.anchors
    return measured.anchors[0].found


def texts(kind, solution, problem=""):
    return [text for found_kind, text in anchors_of(solution, problem) if found_kind == kind]


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

    def test_a_signed_box_follows_the_formula_rule(self):
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

    def test_only_a_complete_command_is_an_operator(self):
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


@settings(max_examples=400, deadline=None)
@given(st.text("12.,/%\\ a{}\u00e9\u0663\n", max_size=14))
def test_numbers_are_those_that_one_pass_over_the_text_finds(text):
    expected = set()
    for number, denominator, percent in anchors._NUMBER.findall(anchors._tidy_numbers(text)):
        expected |= {number} | ({number + "%"} if percent else set())
        expected |= {f"{number}/{denominator}"} if denominator and "." not in number else set()
    assert anchors.numbers_in(text) == expected
