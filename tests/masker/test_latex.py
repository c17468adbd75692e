"""Math spans, boxes and flattening of any text: ordered, in range and of the same length."""

from hypothesis import given, settings

from megatron_paint.masker.anchors import flatten
from megatron_paint.masker.latex import alignments, boxes, math_spans
from tests.masker.latex_text import latex_text


@settings(max_examples=400, deadline=None)
@given(latex_text)
def test_spans_are_ordered_and_in_range(text):
    spans = math_spans(text, alignments(text))
    edges = [edge for span in spans for edge in (span.start, span.content_start, span.content_end, span.end)]
    assert edges == sorted(edges)
    for box in boxes(text):
        assert text[box.start : box.content_start].startswith("\\boxed")
        assert text[box.content_end] == "}"
    assert len(flatten(text)) == len(text)
