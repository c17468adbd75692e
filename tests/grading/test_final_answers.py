r"""The final answer for graders that compare text: boxes, "Answer:" lines, letters of choices, equal texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_paint.grading.final_answers import choice_in, final_answer, letter_of, texts_equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"It is \boxed{abba}.", "abba"),
        (r"First \boxed{a}. Answer: b. Then \boxed{c}", "c"),
        ("We get it.\nAnswer: abba", "abba"),
        ("**Answer:** `abba`", "abba"),
        ("The final answer is: abba ", "abba"),
        ("Answer: one\nAnswer: two", "two"),
        ("> Answer : x y", "x y"),
        ("<think>Answer: no</think>\nAnswer: yes", "yes"),
        ("<think>Answer: no</think> so", None),
        ("the answer is abba", None),  # no colon, so nothing shows where it begins and ends
        ("Answer:", None),
        ("Answer: **", None),
        ("An answer can be given: no", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "gold", "rules", "equal"),
    [
        ("abba", "abba", {}, True),
        (" abba\n", "abba ", {}, True),
        ("Abba", "abba", {}, False),
        ("Abba", "abbA", {"ignore_case": True}, True),
        ("STRASSE", "straße", {"ignore_case": True}, True),
        ("a  b", "a b", {}, False),
        ("a \n b", "a b", {"white_space": "collapse"}, True),
        ("ab", "a b", {"white_space": "collapse"}, False),
        ("a b", "ab", {"white_space": "remove"}, True),
        (r"\text{abba}", "abba", {}, True),
        (r"\texttt{a\_b}", "a_b", {}, True),
        ("$abba$", "abba", {}, True),
        ("`abba`", "abba", {}, True),
        (r"\text{ab}ba", "abba", {}, False),
        (r"a\_b", r"a\_b", {}, True),
        ("", "abba", {}, False),
    ],
)
def test_texts_equal(given, gold, rules, equal):
    assert texts_equal(given, gold, **{"ignore_case": False, "white_space": "strip"} | rules) is equal


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So \boxed{B}.", "B"),
        (r"\boxed{\text{(C)}}", r"\text{(C)}"),
        ("Answer: B", "B"),
        ("The answer is (d).", "d"),
        ("so the answer is **C**.", "C"),
        ("The answer is A.", "A"),
        ("The answer is A good idea.", None),  # a word
        ("The answer is B because x", "B"),
        ("The answer is Berlin", None),
        ("Answer: Berlin", "Berlin"),  # the text of a choice, perhaps
        ("Answer: A\nNo, the answer is (B)", "B"),
        ("The answer is (B).\nAnswer: the second", "the second"),
        ("<think>The answer is A.</think>The answer is B.", "B"),
        ("B", None),
        ("", None),
    ],
)
def test_choice_in(text, found):
    assert choice_in(text) == found


CHOICES = ("blue", "12", "A", r"\frac{1}{2}")


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("B", (), "B"),
        ("(b)", (), "B"),
        ("b.", (), "B"),
        ("C)", (), "C"),
        (r"\textbf{(D)}", (), "D"),
        ("$E$", (), "E"),
        ("B. 12", (), "B"),
        ("(B) 12", (), "B"),
        (r"\textbf{(B)}\ 12", (), "B"),
        ("B: 12", (), "B"),
        ("12", (), None),
        ("Blue", (), None),
        ("B, C", (), None),
        ("AB", (), None),
        ("", (), None),
        ("B", CHOICES, "B"),
        ("Blue", CHOICES, "A"),
        ("12", CHOICES, "B"),
        ("A", CHOICES, "A"),  # a letter comes before the text of the third choice
        (r"\dfrac{1}{2}", CHOICES, "D"),
        ("E", CHOICES, None),  # there are four choices
        ("green", CHOICES, None),
    ],
)
def test_letter_of(text, choices, letter):
    assert letter_of(text, choices) == letter


@settings(max_examples=100, deadline=None)
@given(
    st.text()
    | st.lists(st.sampled_from(["Answer:", "answer is", "(B)", " A ", "\\boxed{", "}", "\n", "*", "x"])).map("".join)
)
def test_any_text(text):
    found = choice_in(text)
    assert found is None or letter_of(found, ()) in {None, *map(chr, range(65, 91))}
    answer = final_answer(text)
    assert answer is None or texts_equal(answer, answer, ignore_case=False, white_space="strip")


def test_long_white_space_is_read_once():
    text = "answer" + " " * 100_000 + "answer is" + " " * 100_000
    assert choice_in(text * 3) is None
    assert final_answer(text * 3) is None
