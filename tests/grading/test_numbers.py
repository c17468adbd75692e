r"""Exact numbers, and the decimals that stand for numbers without an exact decimal."""

from fractions import Fraction

import pytest
import sympy

from megatron_paint.grading.compare import numeric_equal
from megatron_paint.grading.numbers import numbers_agree, read_number
from megatron_paint.grading.repeating_decimals import repeating_as_fractions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-12.50", Fraction(-25, 2)),
        (".5", Fraction(1, 2)),
        ("42.", 42),
        ("1,234,567", 1234567),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\frac{-1}{3}", Fraction(1, 3)),
        (r"\frac{0.5}{2}", Fraction(1, 4)),
        ("3/4", Fraction(3, 4)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        (r"-3\frac{1}{2}", Fraction(-7, 2)),
        ("3 1/2", Fraction(7, 2)),
        (r"3 \times 10^{-4}", Fraction(3, 10000)),
        ("1.5e3", 1500),
        ("2^{-40}", Fraction(1, 2**40)),
        ("{5}", 5),
        ("(-5)", -5),
    ],
)
def test_read_number(text, value):
    assert read_number(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1,23",
        "1 2",
        "3-4",
        r"\frac{1}{0}",
        "0^{-1}",
        "9^{999999999}",
        "1" * 401,
        "1/2/3",
        "--1",
        r"3\frac{-1}{2}",
    ],
)
def test_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("gold", "given", "agree"),
    [
        ("10^{-8}", "0.00000001", True),
        ("10^{-8}", "0", False),
        ("0.0000001", "0.0000002", False),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.33333", False),
        (r"\frac{1}{3000000}", "0.000000333333", True),
        (r"\frac{1}{3000000}", "0.0000003", False),  # equal after rounding to six decimals
        ("0.333333", r"\frac{1}{3}", True),
        (r"\frac{1}{8}", "0.1250001", False),  # 0.125 writes it exactly
        (r"50\%", "0.5", True),
        (r"50\%", "50", True),
        (r"0.5\%", "0.5", False),
        (r"12.5\%", "12.5", True),
        (r"1\%", "0.1", False),
    ],
)
def test_numbers_agree(gold, given, agree):
    assert numbers_agree(read_number(gold), read_number(given), precision=6) is agree


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("3**-80", "3**-81", False),
        ("3**-80", "9**-40", True),
        ("pi/10**9", "2*pi/10**9", False),
        ("sqrt(2)", "1.414214", True),
        ("sqrt(2)", "1.41421", False),
        ("sqrt(2)/10**9", "1.41421e-9", True),
        ("sqrt(2)/10**9", "1.5e-9", False),
        ("1 + 10**-30", "1", False),
        ("sqrt(8)", "2*sqrt(2)", True),
        ("x/10**9", "2*x/10**9", False),
        ("0.5*x", "x/2", True),
        ("exp(-40)", "exp(-41)", False),
        ("oo", "-oo", False),
        ("2*I", "2", False),
    ],
)
def test_values_of_expressions(a, b, equal):
    assert numeric_equal(sympy.sympify(a), sympy.sympify(b), 6, 15) is equal


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"0.\overline{3}", r"\frac{1}{3}"),
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r"x=2.\bar{7}", r"x=\frac{25}{9}"),
        (r"0.\dot{1}4285\dot{7}", r"\frac{1}{7}"),
        (r"0.0\dot{3}", r"\frac{1}{30}"),
        ("-0.(3)", r"-\frac{1}{3}"),
        ("0.5(3)+x", "0.5(3)+x"),
        (r"0.333\ldots", r"\frac{1}{3}"),
        (r"0.1212\ldots", r"\frac{4}{33}"),
        (r"3.14159\ldots", r"3.14159\ldots"),
        (r"3.14159265\ldots", "3.14159265"),
        (r"\overline{AB}", r"\overline{AB}"),
    ],
)
def test_repeating_decimals(text, latex):
    assert repeating_as_fractions(text) == latex
