r"""Compares two answers by value with math-verify. It runs in the grading workers, because math-verify may never end.

math-verify compares numbers after rounding to six decimals, so 1/3^80 equals 1/3^81 there. `numeric_equal` replaces
that rule. math-verify also drops dots, bases and every letter after a number that it takes for a unit; the answers are
compared so that these count.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_paint.grading.intervals import alike
from megatron_paint.grading.kinds import BASE_TOKEN, decide
from megatron_paint.grading.lists import ordered_values, split_list
from megatron_paint.grading.numbers import Number, close, has_decimal, numbers_agree
from megatron_paint.grading.operators import split_arrows, split_operators

DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
# A comma is a decimal point only after 0, as in `0,5`, or after more digits than a group has. `1,5` is a list.
PLAIN_NUMBER = re.compile(r"-?(?:[0-9]*\.?[0-9]+|(?:0|[0-9]{4,}),[0-9]+|[0-9]{1,3}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?)")
# An interval or a union; an inequality may describe the same set.
SET = re.compile(r".*\\(?:infty|cup)(?![A-Za-z]).*|[(\[][^,]*,[^,]*[)\]]", re.DOTALL)
DOTS = "\\ldots"
MOST_ELEMENTS = 20
DIGITS = 40  # of the decimals with which irrational numbers are compared
EQUAL = 1e-30  # largest relative difference of irrational numbers that are equal
# What math-verify does not read inside a list.
NEEDS_ELEMENTS = re.compile(r"\\text|\\circ|[0-9]_|[0-9]:[0-9]|%|\\\$")


@dataclass(frozen=True, slots=True)
class Options:
    """math-verify's options."""

    kinds: tuple[str, ...]
    precision: int
    strict: bool
    set_relation: bool


def parse_values(text: str, kinds: tuple[str, ...], *, units: bool = False) -> list[Any]:
    """Returns the values that math-verify finds in an answer; an empty list if it finds none.

    A text without math delimiters is parsed as one expression. It is put into a box, because the parser finds no LaTeX
    outside delimiters. A number is parsed as plain text too, because LaTeX reads the European `1000,99` as a list.
    units: math-verify removes what it takes for units.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    reading = NormalizationConfig(basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="all")
    configs = {"latex": LatexExtractionConfig(boxed_match_priority=0, normalization_config=reading)}
    configs["expr"] = ExprExtractionConfig()
    chosen = [configs[kind] for kind in kinds]
    # math-verify's time limit is off: its alarm does not interrupt C code. The parent's limit does.
    if DELIMITER.search(text) or "latex" not in kinds:
        return parse(text, chosen, parsing_timeout=None)
    values = parse("\\boxed{" + text + "}", chosen, parsing_timeout=None)
    if "expr" in kinds and PLAIN_NUMBER.fullmatch(text):
        values = values + parse(text, [configs["expr"]], parsing_timeout=None)
    return values


def prose_equal(gold: str, response: str, options: Options) -> bool:
    """Tells whether math-verify finds the gold answer in a response that has no box."""
    return _verify(
        parse_values(gold, options.kinds, units=True), parse_values(response, options.kinds, units=True), options
    )


def answers_equal(gold: str, given: str, options: Options, *, depth: int = 0) -> bool:
    """Tells whether two answers are equal: by their kind, else by value, else element by element."""
    pair = decide(gold, given, precision=options.precision)
    if isinstance(pair, bool):
        return pair
    (operators, gold), (others, given) = split_operators(pair.gold), split_operators(pair.given)
    if operators != others:
        return False
    if operators:
        return answers_equal(gold, given, options, depth=depth)
    (arrows, golds), (others, givens) = split_arrows(gold), split_arrows(given)
    if arrows != others:
        return False
    if arrows:
        return depth == 0 and _each_equal(golds, givens, options)
    gold, given = alike(gold, given)
    values = ordered_values(gold, given)
    if values is not None:
        return depth == 0 and _each_equal(*values, options)
    if DOTS in gold + given:
        return depth == 0 and _elements_equal(gold, given, options, ordered=True)
    bases = sorted(BASE_TOKEN.findall(gold)), sorted(BASE_TOKEN.findall(given))
    if bases[0] != bases[1] and all(bases):
        return False
    relation_allowed = replace(options, set_relation=options.set_relation or bool(SET.fullmatch(gold)))
    if _verify(parse_values(gold, options.kinds), parse_values(given, options.kinds), relation_allowed):
        return True
    return depth == 0 and bool(NEEDS_ELEMENTS.search(gold + given)) and _elements_equal(gold, given, options)


def _verify(gold: list[Any], given: list[Any], options: Options) -> bool:
    from math_verify import grader, verify

    grader.sympy_numeric_eq = numeric_equal  # math-verify has no option for it
    return verify(
        gold,
        given,
        float_rounding=options.precision,
        strict=options.strict,
        allow_set_relation_comp=options.set_relation,
        timeout_seconds=None,
    )


def _elements_equal(gold: str, given: str, options: Options, *, ordered: bool = False) -> bool:
    """Compares two lists element by element. Brackets must be the same; without brackets or in braces it is a set."""
    (opened, golds), (other, givens) = split_list(gold), split_list(given)
    if len(golds) != len(givens) or not 2 <= len(golds) <= MOST_ELEMENTS or (opened or "{") != (other or "{"):
        return False
    ordered = ordered or opened not in ("", "{")

    if ordered:
        return _each_equal(golds, givens, options)
    remaining = list(givens)
    for element in golds:
        match = next((other for other in remaining if _element_equal(element, other, options)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _each_equal(golds: list[str], givens: list[str], options: Options) -> bool:
    pairs = zip(golds, givens, strict=False)
    return len(golds) == len(givens) <= MOST_ELEMENTS and all(_element_equal(a, b, options) for a, b in pairs)


def _element_equal(gold: str, given: str, options: Options) -> bool:
    return gold == given if DOTS in gold + given else answers_equal(gold, given, options, depth=1)


def numeric_equal(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Tells whether two values of sympy are the same number. It takes the place of math-verify's function.

    Numbers without a decimal point are compared exactly, or to 30 digits if they are irrational. So are decimals, but a
    decimal may also stand for a number that no decimal can write. float_rounding: decimals in which it must then agree.
    """
    from sympy import MatrixBase, MatrixExpr

    if isinstance(a, (MatrixBase, MatrixExpr)) and isinstance(b, (MatrixBase, MatrixExpr)):
        a, b = _done(a), _done(b)
        if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape):
            return False
        return all(
            numeric_equal(x, y, float_rounding, numeric_precision) for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    numbers = _as_number(a), _as_number(b)
    if None not in numbers:
        return numbers_agree(*numbers, precision=float_rounding)
    a, b = _done(a), _done(b)
    numbers = _as_number(a), _as_number(b)
    if None not in numbers:
        return numbers_agree(*numbers, precision=float_rounding)
    try:
        return _expressions_equal(a, b, float_rounding)
    except (AttributeError, TypeError, ValueError, ArithmeticError):
        return False


def _expressions_equal(a: Any, b: Any, precision: int) -> bool:
    exact_a, exact_b = _without_floats(a), _without_floats(b)
    if exact_a.free_symbols or exact_b.free_symbols:
        return bool((exact_a - exact_b).evalf(DIGITS) == 0)
    value_a, value_b = exact_a.evalf(DIGITS), exact_b.evalf(DIGITS)
    if value_a == value_b:
        return True
    largest = max(abs(value_a), abs(value_b))
    if not (value_a.is_finite and value_b.is_finite) or not largest.is_positive:
        return False
    if abs(value_a - value_b) <= EQUAL * largest:
        return True
    return (
        bool(value_a.is_real and value_b.is_real)
        and ((_has_float(a) and not _is_decimal(exact_b)) or (_has_float(b) and not _is_decimal(exact_a)))
        and close(Fraction(str(value_a)), Fraction(str(value_b)), precision=precision)
    )


def _as_number(value: Any) -> Number | None:
    """The exact number of an integer, a fraction, a decimal or a percentage of one."""
    from math_verify.grader import get_pct_val
    from sympy import Float, Rational

    part = get_pct_val(value)
    if part is not None:
        number = _as_number(part)
        return number and Number(number.value, number.decimal, percent=True)
    if isinstance(value, Rational):
        return Number(Fraction(value.p, value.q))
    if isinstance(value, Float) and value.is_finite:
        return Number(Fraction(str(value)), decimal=True)
    return None


def _done(value: Any) -> Any:
    try:
        return value.doit()
    except Exception:  # sympy raises any error for what it cannot evaluate; then the value stays as it is
        return value


def _has_float(value: Any) -> bool:
    from sympy import Float

    return bool(value.has(Float))


def _without_floats(value: Any) -> Any:
    """The value with the fraction in place of each decimal."""
    from sympy import Float, Rational

    return value.xreplace({number: Rational(str(number)) for number in value.atoms(Float)})


def _is_decimal(value: Any) -> bool:
    from sympy import Rational

    return isinstance(value, Rational) and has_decimal(Fraction(value.p, value.q))
