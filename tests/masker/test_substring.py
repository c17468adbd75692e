"""Passages in a text: the automaton finds what plain search finds."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_paint.masker.anchors import flatten, normalise
from megatron_paint.masker.substring import _contains, _find_with_automaton, find_substrings
from tests.masker.latex_text import latex_text


def test_the_automaton_finds_what_plain_search_finds():
    rollout = "a+b=c; 2a+b = d, (a+b)^2=c x=1.5 x=1 aa+bb"
    normal = normalise(flatten(rollout))
    length = len(normal.text)
    pieces = {normal.text[i:j] for i in range(length) for j in range(i + 1, min(i + 9, length + 1))}
    passages = [*pieces, "zz", "a+c"]
    plain = {passage for passage in passages if _contains(normal, passage)}
    assert _find_with_automaton(normal, passages) == plain == find_substrings(normal, passages)
    assert 20 < len(plain) < len(pieces)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(latex_text, st.data())
def test_automaton_equals_plain_search(text, data):
    normal = normalise(flatten(text))
    cut = st.integers(0, len(normal.text))
    ends = [sorted((data.draw(cut), data.draw(cut))) for _ in range(6)]
    passages = [normal.text[start:end] for start, end in ends if start < end]
    plain = {passage for passage in passages if _contains(normal, passage)}
    assert _find_with_automaton(normal, passages) == plain
