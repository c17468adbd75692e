"""Tokens of source code: values of literals, Python by its tokenizer, also broken, and other languages by a lexer."""

import ast
import io
import keyword
import re
import textwrap
import tokenize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.masker import lexer_tokens as lexer_module
from megatron_paint.masker.code_tokens import number_value, string_value
from megatron_paint.masker.lexer_tokens import LEXERS, language_of, lexer_tokens
from megatron_paint.masker.python_tokens import LONGEST_LINE, python_tokens
from tests.grading import test_kinds as test_cases_module
from tests.masker.code_text import any_code

NUMBERS = [
    "0",
    "00",
    "7",
    "1_000",
    "1000.0",
    "1e3",
    "1E+3",
    "0x3e8",
    "0XFF",
    "0b101",
    "0o17",
    ".5",
    "0.50",
    "5.",
    "1e-3",
]
NUMBERS += ["12345678901234567890", "0.1", "100_000.000_1", "1_0e1_0"]


@pytest.mark.parametrize("first", NUMBERS)
def test_numbers_have_one_form_for_each_value(first):
    """Python's own reading decides which are equal."""
    for second in NUMBERS:
        assert (number_value(first) == number_value(second)) == (ast.literal_eval(first) == ast.literal_eval(second))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", "1000"),
        ("0x3e8", "1000"),
        (".50", "0.5"),
        ("10L", "10"),
        ("1_000u32", "1000"),
        ("1'000", "1000"),
        ("2.5f", "2.5"),
        ("3J", "3j"),
        ("1e40", "1e40"),
        ("0b12", "0b12"),  # no number of this base
        ("1e9999999", "1e9999999"),
        ("9" * 400, "9" * 400),
        ("0x" + "f" * 400, "0x" + "f" * 400),
    ],
)
def test_forms_of_numbers(text, value):
    assert number_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "'a b'",
        '"a b"',
        "'''a\nb'''",
        r"'a\tb'",
        r"r'a\tb'",
        r"'it\'s'",
        r"'\x41\u0042'",
        "b'ab'",
        "''",
        r'"\\n"',
        r"'\d'",
    ],
)
def test_strings_have_the_value_that_python_gives_them(text, recwarn):
    value = ast.literal_eval(text)
    assert string_value(text) == (value.decode() if isinstance(value, bytes) else value)


def plain(source):
    return [(token.kind, token.text) for token in python_tokens(source) if token.kind != "newline"]


class TestPython:
    def test_tokens_by_hand(self):
        source = "def f(a):\n    # comment\n    return a['k'] + 1_0\n"
        assert plain(source) == [
            ("keyword", "def"),
            *(("name", "f"), ("operator", "("), ("name", "a"), ("operator", ")"), ("operator", ":")),
            *(("keyword", "return"), ("name", "a"), ("operator", "["), ("string", "k"), ("operator", "]")),
            *(("operator", "+"), ("number", "10")),
        ]

    def test_positions(self):
        source = "if x:\n        value = 'é' + other  # c\n\tdone()"
        for token in python_tokens(source):
            if token.kind in ("name", "keyword", "operator"):
                assert source[token.start : token.end] == token.text
        (string,) = [token for token in python_tokens(source) if token.kind == "string"]
        assert source[string.start : string.end] == "'é'"

    @pytest.mark.parametrize("module", [ast, io, keyword, textwrap, lexer_module, test_cases_module])
    def test_a_module_has_the_tokens_that_the_tokenizer_gives(self, module):
        """Names, values of literals and operators of complete files, in order; formatted strings as plain ones."""
        with open(module.__file__, encoding="utf-8") as file:
            source = re.sub(r"\bf(?=[\"'])", "", file.read())
        expected = []
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            kind, text = tokenize.tok_name[token.type], token.string
            if kind in ("NAME", "OP"):
                expected.append(text)
            elif kind in ("NUMBER", "STRING"):
                expected.append(ast.literal_eval(text))
        found = []
        for token in python_tokens(source, docstrings=True):
            if token.kind != "newline":
                found.append(ast.literal_eval(token.text) if token.kind == "number" else token.text)
        assert [_without_space(one) for one in found] == [_without_space(one) for one in expected]

    def test_formatted_strings(self):
        source = 'f"total {sum(values):>{width}.2f} of {{n}} {name!r}"'
        tokens = plain(source + " + x")
        assert next(text for kind, text in tokens if kind == "string") == "total "
        assert {"values", "name", "x"} <= {text for kind, text in tokens if kind == "name"}
        assert any("of {n} " in text for kind, text in tokens if kind == "string")

    def test_docstrings_are_comments(self):
        source = '"""Module text."""\ndef f():\n    """Function text."""\n    x = """kept"""\n'
        assert [text for kind, text in plain(source) if kind == "string"] == ["kept"]
        strings = [token.text for token in python_tokens(source, docstrings=True) if token.kind == "string"]
        assert strings == ["Module text.", "Function text.", "kept"]

    @pytest.mark.parametrize(
        ("source", "names"),
        [
            ("a = (b +\nc = [d", ["a", "b", "c", "d"]),
            ("a = 'b\nc = d", ["a", "b", "c", "d"]),
            ('a = b\nc = """d\ne = f', ["a", "b", "c", "d", "e", "f"]),
            ("a = b)\nc = d]", ["a", "b", "c", "d"]),
            ("if a:\n      b\n   c\n  d", ["a", "b", "c", "d"]),
            ("a $ b ? c\nd ! e", None),  # since 3.12 the tokenizer refuses the rest of such a line
            ("a = b \\", ["a", "b"]),
            ("a\x00b\nc", None),
            ("'''a\n\"\"\"b\n'c", ["a", "b", "c"]),
            ("x = '''a'''\ny = '''b", ["x", "y", "b"]),
            ("", []),
        ],
    )
    def test_broken_source_is_read_as_far_as_possible(self, source, names):
        found = [text for kind, text in plain(source) if kind == "name"]
        if names is None:
            assert found[0] == "a"
            assert found[-1] in "ce"
        else:
            assert found == names

    def test_a_long_line_is_divided(self):
        names = [f"name{number}" for number in range(2000)]
        source = " + ".join(names)
        assert len(source) > 3 * LONGEST_LINE
        found = [text for kind, text in plain(source) if kind == "name"]
        assert len(set(names) - set(found)) <= len(source) // LONGEST_LINE + 1


def _without_space(value):
    """Lines of a long string lose their indentation, so only the rest is compared."""
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return "".join(text.split()) if isinstance(text, str) else text


class TestLexers:
    @pytest.mark.parametrize("language", sorted(set(LEXERS.values())))
    def test_every_language_has_a_lexer(self, language):
        tokens = lexer_tokens("alpha=$beta; x 1234" if language == "bash" else "alpha = beta + 1234\n", language)
        assert {"alpha", "beta"} <= {token.text for token in tokens if token.kind in ("name", "keyword")}, tokens
        assert "1234" in {token.text for token in tokens if token.kind == "number"}

    @pytest.mark.parametrize(
        ("language", "source", "expected"),
        [
            ("c", 'int f() { return g("a\\tb", 0x10); } // c', {"g", "a\tb", "16"}),
            ("javascript", "const s = `a ${b} c`; let n = 1_000;", {"a ", "b", " c", "1000", "s", "n"}),
            ("rust", 'let total: u64 = 1_000u64; println!("{}", total);', {"total", "1000", "{}"}),
            ("go", "func f(a int) string { return fmt.Sprintf(`x`, a) }", {"Sprintf", "x", "a", "fmt"}),
            ("php", "$total = count($list) + 'k';", {"total", "list", "k"}),
            ("sql", "SELECT name FROM users WHERE id = 17;", {"users", "17"}),
        ],
    )
    def test_tokens(self, language, source, expected):
        tokens = lexer_tokens(source, language)
        assert expected <= {token.text for token in tokens}
        for token in tokens:
            assert 0 <= token.start <= token.end <= len(source)
            if token.kind == "name":
                assert source[token.start : token.end] == token.text

    def test_pieces_have_the_tokens_of_the_complete_source(self, monkeypatch):
        source = "int alpha(int b) {\n  return b + 12;\n}\n" * 50
        complete = lexer_tokens(source, "c")
        monkeypatch.setattr(lexer_module, "LONGEST_PIECE", 200)
        assert lexer_tokens(source, "c") == complete

    @pytest.mark.parametrize(
        ("named", "source", "language"),
        [
            ("python", "x = 1;", "python"),
            ("py", "", "python"),
            ("c++", "", "cpp"),
            ("ts", "", "typescript"),
            ("", "x = {\n 'a': 1}\n", "python"),
            ("", "int x = 1;\n", "javascript"),
            ("", "if (a) {\n", "javascript"),
            ("", "#include <x>\n", "javascript"),
            ("brainfuck", "x = 1", "python"),
            ("text", "# a comment", "python"),
        ],
    )
    def test_the_language_of_a_block(self, named, source, language):
        assert language_of(source, named) == language


@settings(max_examples=300, deadline=None)
@given(any_code)
def test_python_tokens_of_any_text(source):
    tokens = python_tokens(source)
    assert tokens == python_tokens(source)
    assert all(0 <= token.start <= len(source) and token.start <= token.end for token in tokens)


@settings(max_examples=150, deadline=None)
@given(any_code, st.sampled_from(sorted(set(LEXERS.values()))))
def test_lexer_tokens_of_any_text(source, language):
    tokens = lexer_tokens(source, language)
    assert tokens == lexer_tokens(source, language)
    assert all(0 <= token.start <= token.end <= len(source) for token in tokens)
