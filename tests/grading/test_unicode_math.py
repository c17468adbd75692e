r"""Unicode mathematics as LaTeX."""

import pytest

from megatron_paint.grading.unicode_math import LONGEST, to_latex


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("√2", r"\sqrt{2}"),
        ("2√12", r"2\sqrt{12}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("√x", r"\sqrt{x}"),
        ("∛{27}", r"\sqrt[3]{27}"),
        ("3½", r"3\frac{1}{2}"),
        ("x²y⁻¹", "x^{2}y^{-1}"),
        ("a₁₂", "a_{12}"),
        ("π", r"\pi "),
        ("𝜋", r"\pi "),
        ("λ", r"\lambda "),
        ("Ω", r"\Omega "),
        ("−1", "-1"),
        ("3×10⁴", r"3\times 10^{4}"),
        ("１２，３", "12,3"),
        ("（０，１］", "(0,1]"),
        ("𝟏𝟐", "12"),
        ("٣", "3"),
        ("60°", r"60^\circ "),
        ("20℃", r"20^\circ C"),
        ("0.1̅6̅", r"0.\overline{16}"),
        ("0.3̇", r"0.\dot{3}"),
        ("1\N{NARROW NO-BREAK SPACE}000", r"1\,000"),
        ("x\N{ZERO WIDTH SPACE}y", "xy"),
        ("中文", "中文"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_to_latex(text, latex):
    assert to_latex(text) == latex


def test_a_text_longer_than_any_answer_is_left_alone():
    text = "½" * (LONGEST + 1)
    assert to_latex(text) is text
