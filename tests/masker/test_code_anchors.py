"""Anchors of programs by hand, in any text, in a broken rollout, and where a program may be cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings

from megatron_paint.masker.code_anchors import code_parts, extract_code, find_code
from megatron_paint.masker.code_blocks import CodeBlock, code_blocks, fenced_blocks
from megatron_paint.masker.overlap import measure_overlap
from tests.masker.code_text import any_code
from tests.masker.cutting import characters, cut

SOLUTION = '''We keep the best sum so far.
```python
import heapq

def best(values, limit=1_000):
    """Returns the best sum."""
    seen = {"total so far": 0}
    for value in values:
        heapq.heappush(seen, value + 17)
    return max(seen) * limit
```
So the function is \\boxed{best}.'''
PROBLEM = "Write a function `best(values, limit)` that returns the best sum. Use 17."


def anchors(problem, solution):
    return [(anchor.kind, anchor.text) for anchor in extract_code(problem, solution)]


def found(solution, rollout, problem=""):
    measured = measure_overlap(problem=problem, solution=solution, rollout=rollout, anchors="code")
    return {anchor.text for anchor in measured.anchors if anchor.found}


def test_anchors_of_python_by_hand():
    """The problem has best, values, limit and 17; 0 is trivial; a docstring is no literal; max is called everywhere."""
    assert anchors(PROBLEM, SOLUTION) == [
        ("boxed", "best"),
        ("return", "return max(seen)*limit"),
        ("call", "heappush()"),
        ("literal", "1000"),
        ("literal", "'total so far'"),
        ("name", "heapq"),
        ("name", "seen"),
        ("name", "value"),
    ]


def test_anchors_of_javascript_by_hand():
    solution = (
        "```js\n// add up\nfunction total(list) {\n  const base = 'k1';\n"
        "  return list.reduce((a, b) => a + b, 10);\n}\n```"
    )
    assert anchors("Add up `list`.", solution) == [
        ("return", "return list.reduce((a,b)=>a+b,10)"),
        ("call", "reduce()"),
        ("literal", "'k1'"),
        ("literal", "10"),
        ("name", "total"),
        ("name", "base"),
    ]


@pytest.mark.parametrize(
    ("language", "code", "returned"),
    [
        ("py", "return a + b", "return a+b"),
        ("py", "return a; b = c", None),  # one name alone is an anchor already
        ("py", "return f(a,\n  b)[0]\nc", "return f(a,b)[0]"),
        ("py", "return 'x y' if a else None", "return 'x y'if a else None"),
        ("py", "return not a", "return not a"),
        ("py", "return (a", "return (a"),
        ("py", "return a)", None),
        ("py", "return\nb + c", None),
        ("py", "return -1_0", "return -10"),
        ("js", "return f(a);}", "return f(a)"),
        ("js", "return { k: [1, 2] };", "return {k:[1,2]}"),
        ("js", "return a +\n  b\nc", "return a+b"),
        ("js", "return a\n+ b", None),
        ("js", "return\n", None),
        ("go", "return a, nil\n}", "return a,nil"),
        ("py", "return a + return b", "return a+"),
    ],
)
def test_returned_expressions(language, code, returned):
    found = [text for kind, text in anchors("", f"```{language}\n{code}\n```") if kind == "return"]
    assert found == ([] if returned is None else [returned])


@pytest.mark.parametrize(
    ("solution", "rollout", "is_found"),
    [
        ("```py\nx1 = 1_000\n```", "```py\ny = 1000\n```", "1000"),
        ("```py\ny1 = 'abc'\n```", '```py\nz = "abc"\n```', "'abc'"),
        ("```py\ny1 = 0x10\n```", "```c\nint z = 16;\n```", "16"),
        ("```py\nreturn  a+b\n```", "```py\nreturn a + b  # sum\n```", "return a+b"),
        ("```py\nreturn (a +\n   b)\n```", "```py\nreturn (a + b)\n```", "return (a+b)"),
        ("```py\nitems.sort()\n```", "```py\nother.sort(key=f)\n```", "sort()"),
        ("```py\ncount = 5\n```", "First, `count` is 5.\n```py\nx = 1\n```", "count"),  # inline code
        ("```py\ncount = 5\n```", "```py\ncount = count + (", "count"),  # the rollout was cut off
        ("count = 57", "count = 57", "57"),  # no fence: the complete text
    ],
)
def test_equal_in_another_writing(solution, rollout, is_found):
    assert is_found in found(solution, rollout)


@pytest.mark.parametrize(
    ("solution", "rollout", "is_missing"),
    [
        ("```py\nx1 = 1000\n```", "```py\ny = 10000\n```", "1000"),
        ("```py\nx1 = 1000\n```", "```py\ny = '1000'\n```", "1000"),
        ("```py\nx1 = 'abc'\n```", "```py\ny = 'Abc'\n```", "'abc'"),
        ("```py\ncount = 5\n```", "```py\nCount = counts\n```", "count"),
        ("```py\ncount = 5\n```", "The count is high.\n```py\nx = 1\n```", "count"),  # prose beside a fence
        ("```py\ncount = 5\n```", "```py\n# count\nx = 1\n```", "count"),  # a comment
        ("```py\nsort(x)\n```", "```py\nsort = 1\n```", "sort()"),  # a name, and no call
        ("```py\nreturn a + b\n```", "```py\nreturn b + a\n```", "return a+b"),
    ],
)
def test_different_is_not_found(solution, rollout, is_missing):
    extracted = {text for _, text in anchors("", solution)}
    assert is_missing in extracted
    assert is_missing not in found(solution, rollout)


@pytest.mark.parametrize("language", ["python", "js", "rust", "go", "c", "", "unknown"])
def test_a_solution_reproduces_itself(language):
    body = 'alpha = beta("some text", 1_234)\nreturn alpha + gamma(56)\n'
    solution = f"Thus:\n```{language}\n{body}```\nand \\boxed{{alpha}}."
    measured = measure_overlap(problem="", solution=solution, rollout=solution, anchors="code")
    assert measured.score == 1
    assert len(measured.anchors) >= 5


def test_no_code_has_no_anchors():
    assert anchors("", "```python\n\n```") == []
    assert find_code((), "x = 17") == ()


class TestBlocks:
    def test_fences(self):
        text = "a\n```Python title\nx\n```\nb ~~~\n~~~js\ny\n```\nz\n~~~~\n````\nopen"
        blocks = fenced_blocks(text)
        assert [(text[b.start : b.end], b.language) for b in blocks] == [
            ("x\n", "python"),
            ("y\n```\nz\n", "js"),
            ("open", ""),
        ]

    def test_inline_code_has_the_first_language(self):
        text = "Use `total` here.\n```js\nx\n```"
        assert [(text[b.start : b.end], b.language) for b in code_blocks(text)] == [("total", "js"), ("x\n", "js")]

    def test_without_a_fence_everything_is_code(self):
        assert code_blocks("x = `1`") == [CodeBlock(0, 7, "")]


class TestCut:
    def cut(self, text, share, **options):
        return cut(text, share, parts=code_parts, **options)

    def test_a_statement_is_kept_complete(self):
        code = "```python\nfirst = 1\nsecond = call(\n    alpha,\n    beta,\n)\nthird = 3\n```\n"
        whole_lines = {code[:end].rstrip() for end in range(len(code) + 1) if code[end : end + 1] == "\n"} | {code, ""}
        statements = whole_lines - {one for one in whole_lines if one.endswith(("call(", "alpha,", "beta,"))}
        for number in range(len(code) + 1):
            prefix = self.cut(code, number / len(code), unit="segment")
            assert prefix in statements, prefix
        inside = {self.cut(code, number / len(code)) for number in range(code.index("second") + 12, code.index(")\n"))}
        assert inside <= {
            "```python\nfirst = 1",
            "```python\nfirst = 1\nsecond = call(\n    alpha,",
            "```python\nfirst = 1\nsecond = call(",
        }

    def test_a_dot_in_code_ends_no_sentence(self):
        code = 'x = "Hi. There."\ny = 1. \nprint("a! b? c.")'
        for number in range(len(code) + 1):
            prefix = self.cut(code, number / len(code), unit="segment")
            assert prefix in ("", code.split("\n")[0], "\n".join(code.split("\n")[:2]).rstrip(), code)

    def test_a_dollar_in_code_opens_no_formula(self):
        text = "```sh\necho $a\n```\nThe price. It is $x=1$ here. End."
        parts = code_parts(text)
        assert [text[span.start : span.end] for span in parts.formulas] == ["$x=1$"]
        assert [text[span.start : span.end] for span in parts.others] == ["echo $a"]

    def test_prose_around_code_is_cut_at_sentences(self):
        text = "We add. Then we stop.\n```py\nx = 1\n```\nDone. It is right."
        prefixes = {self.cut(text, number / len(text), unit="segment") for number in range(len(text) + 1)}
        assert "We add." in prefixes
        assert text[: text.index("Done.") + 5] in prefixes

    def test_share_one_is_the_solution(self):
        assert self.cut(SOLUTION, 1.0) == SOLUTION


@settings(max_examples=300, deadline=None)
@given(any_code, any_code, any_code)
def test_any_text(problem, solution, rollout):
    extracted = extract_code(problem, solution)
    assert extracted == extract_code(problem, solution)
    if "boxed" not in solution:
        assert all(find_code(extracted, solution))
    assert len({anchor.text for anchor in extracted}) == len(extracted)
    assert all(anchor.text for anchor in extracted)
    hits = find_code(extracted, rollout)
    assert len(hits) == len(extracted)
    assert hits == find_code(extracted, rollout)


@settings(max_examples=300, deadline=None)
@given(any_code)
def test_parts_of_any_text(text):
    parts = code_parts(text)
    for spans in parts:
        assert all(0 <= span.start < span.end <= len(text) for span in spans)
        assert all(one.end <= other.start for one, other in pairwise(spans))
    for share in (0, 0.3, 0.7, 1):
        for unit in ("token", "segment"):
            assert text.startswith(cut(text, share, characters, unit=unit, parts=code_parts))


HOSTILE = {
    "open brackets": "(\n" * 50_000,
    "open fences": "```\n" * 25_000,
    "open strings": "'\n" * 50_000,
    "quotes and backslashes": "\\'" * 20_000,
    "many quotes and backslashes": "\\'" * 50_000,  # a token each two characters: seconds
    "triple quotes": "'''\n\"\"\"\n" * 12_500,
    "one line of strings": "'a" * 50_000,
    "comments": "/*" * 50_000,
    "braces": "f'{" * 33_000,
    "one name": "a" * 100_000,
    "digits": "1" * 100_000,
    "numbers": "1e9 " * 25_000,
    "returns": "return " * 14_000,
    "returned brackets": "return (" * 12_500,
    "inline code": "``` x\n" + "`a" * 50_000,
    "surrogates": "\ud800='\ud801'\n" * 14_000,
}


# Two kinds of tokenizer: Python's own, and the lexers of a library. `make test` runs one language of each kind.
@pytest.mark.parametrize(
    "language",
    ["", "```js\n", *(pytest.param(f"```{name}\n", marks=pytest.mark.long) for name in ("haskell", "perl", "php"))],
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name.startswith("many") else name for name in HOSTILE]
)
def test_work_on_hostile_text_is_bounded(name, language):
    """Up to 100,000 characters end; pytest's time limit would end a quadratic search."""
    text = language + HOSTILE[name]
    measured = measure_overlap(problem=text[:30_000], solution=text, rollout=text, anchors="code")
    assert 0 <= measured.score <= 1
    code_parts(text)
