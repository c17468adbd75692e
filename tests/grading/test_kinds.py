r"""Units, choices and other kinds of answers, as they are read."""

import time
from fractions import Fraction

import pytest

from megatron_paint.grading.compare import split_list
from megatron_paint.grading.kinds import Pair, decide, reference
from megatron_paint.grading.normal_form import join_thousands, plain_latex
from megatron_paint.grading.units import read_unit, split_unit


@pytest.mark.parametrize(
    ("text", "kinds", "size"),
    [
        ("cm", (("length", 1),), Fraction(1, 100)),
        ("square centimeters", (("length", 2),), Fraction(1, 10000)),
        ("cm^2", (("length", 2),), Fraction(1, 10000)),
        ("miles per hour", (("length", 1), ("time", -1)), Fraction("1609.344") / 3600),
        ("m/s", (("length", 1), ("time", -1)), Fraction(1)),
        ("cents", (("dollar", 1),), Fraction(1, 100)),
        ("kW", (("power", 1),), Fraction(1000)),
        ("MHz", (("frequency", 1),), Fraction(10**6)),
        ("milligrams", (("mass", 1),), Fraction(1, 1000)),
        ("acres", (("length", 2),), Fraction("4046.8564224")),
        ("cups", (("length", 3),), Fraction("0.0002365882365")),
        ("liters per minute", (("length", 3), ("time", -1)), Fraction(1, 60000)),
        ("M", None, Fraction(1)),
        ("apples", None, Fraction(1)),
    ],
)
def test_read_unit(text, kinds, size):
    unit = read_unit(text)
    assert (unit.kinds, unit.size) == (kinds, size)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"12\text{ cm}", "12"),
        (r"9\pi\text{ cm}^2", r"9\pi"),
        ("12 inches", "12"),
        (r"\$5", "5"),
        (r"60^\circ", "60"),
        ("2ab", "2ab"),
        ("5t", "5t"),
        ("12 m", "12 m"),
        (r"2\text{ or more}", r"2\text{ or more}"),
        (r"3, \text{none}", r"3, \text{none}"),
        (r"\text{even}", r"\text{even}"),
    ],
)
def test_split_unit(text, value):
    assert split_unit(text).value == value


def test_a_letter_is_a_unit_only_after_a_space():
    assert split_unit("12 m", letters=True).value == "12"
    assert split_unit("12m", letters=True).value == "12m"
    assert split_unit("12 k", letters=True).value == "12 k"


def test_a_scale_multiplies():
    assert split_unit(r"3\text{ million dollars}").unit.scale == 10**6


@pytest.mark.parametrize(
    ("gold", "given", "verdict"),
    [
        (r"\textbf{(B)}\ 12", "B", True),
        ("x+1", r"\textbf{(B)}\ 1+x", Pair("x+1", "1+x")),
        ("101_2", "101_{two}", True),
        ("3:45", "3:54", False),
        ("2:3", "4:6", True),
        (r"x\text{ cm}", "x", Pair("x", "x")),
        (r"2\pi\text{ m}", r"2\pi\text{ cm}", Pair(r"2\pi", r"\frac{1}{100}(2\pi)")),
        (r"\text{listen}", r"\text{silent}", False),
        ("x=5", "y=5", Pair("x=5", "y=5")),
        ("1,234", "1,235", Pair("1,234", "1,235")),  # it may be a list
    ],
)
def test_decide(gold, given, verdict):
    found = decide(gold, given, precision=6)
    assert found == verdict or (found is True and isinstance(verdict, Pair) and verdict.gold == verdict.given)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("9-4=<<9-4=5>>5 pens.\n#### 5", "5"),
        (r"so \boxed{7}.", "7"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        ("#### ", "#### "),
        ("42", "42"),
    ],
)
def test_reference(answer, result):
    assert reference(answer) == result


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        (r"12\,345", "12345"),
        ("12~345+x", "12345+x"),
        (r"1{,}000{,}000", "1000000"),
        ("1 000 000", "1000000"),
        (r"3\,4", r"3\,4"),
        ("1 000, 2 000", "1 000, 2 000"),
        (r"32,\! 349", "32349"),
        ("1,000", "1,000"),
        (r"1\,2345", r"1\,2345"),
    ],
)
def test_join_thousands(text, joined):
    assert join_thousands(text) == joined


def test_plain_latex():
    assert plain_latex(r"\left(\dfrac12,\, \textbf{even}\right)") == r"(\frac{1}{2}, \text{even})"
    assert plain_latex(r"1 \\ -2") == r"1 \\ -2"


def test_split_list():
    assert split_list(r"\{1, (2,3), \frac{1}{2}\}") == ("{", ["1", "(2,3)", r"\frac{1}{2}"])
    assert split_list("(0,1]") == ("(]", ["0", "1"])
    assert split_list(r"1 \text{ and } 2") == ("", ["1", "2"])
    assert split_list("(0,1), (2,3)") == ("", ["(0,1)", "(2,3)"])


HOSTILE = [r"\text{a} ", " ", "$", r"\ ", r"{\rm a}", "ﷺ", "1_", r"\frac", "√(", r"1\,000", "cm/", "1:", "0.1̅", "A. "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_the_decision_takes_linear_time(piece):
    """It runs in the caller's process, where no time limit holds. A quadratic step took more than 0.5 s."""
    start = time.process_time()
    for text in (piece * (2000 // len(piece)), "1" + piece * (1990 // len(piece)) + "!"):
        decide("x+2", text, precision=6)
    assert time.process_time() - start < 2.0


def seconds_of(text):
    start = time.process_time()
    for _ in range(20):
        join_thousands(text)
    return time.process_time() - start


@pytest.mark.parametrize("end", ["", "x"])
def test_apostrophes_between_thousands_take_linear_time(end):
    """A quadratic step takes 64 times the time for 8 times the length."""
    short, long = (min(seconds_of("1" + "'234" * groups + end) for _ in range(3)) for groups in (500, 4000))
    assert long < 24 * short


@pytest.mark.parametrize(("text", "joined"), [("1'234'567", "1234567"), ("-1'234.50", "-1234.50"), ("f'(x)", "f'(x)")])
def test_apostrophes_separate_thousands(text, joined):
    assert join_thousands(text) == joined
