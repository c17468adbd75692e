r"""The finder of \boxed{}: every closed box with its braces matched, and the last answer of a response."""

import pytest

from megatron_paint.grading import boxes
from megatron_paint.grading.boxes import box_spans, find_boxes, last_box, last_boxes


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{4}, no, \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{x = \boxed{7}}", r"x = \boxed{7}"),
        (r"\boxed{5} and put it within \boxed{}", "5"),
        (r"\boxed{5} then \boxed{6", "5"),
        (r"{{{ \boxed{5}", "5"),
        (r"}}} \boxed{5} }", "5"),
        (r"\boxed 12.", "12"),
        (r"\fbox{3}", "3"),
        (r"\boxedly{3}", None),
        ("no box", None),
        ("", None),
        (r"<think>\boxed{4}</think>It is \boxed{5}", "5"),
        (r"<think>\boxed{4}</think>It is four", "4"),
        (r"<think>\boxed{4}", "4"),
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


def test_neighbouring_boxes_belong_together():
    assert last_boxes(r"\boxed{9} is not it. Thus \boxed{3} and \boxed{5}") == ["3", "5"]
    assert last_boxes(r"\boxed{3}" + " " * 80 + r"or \boxed{5}") == ["5"]


def test_every_closed_box_has_its_span():
    text = r"\boxed {a \boxed{b} \}} \fbox{c} \boxed 4 \boxed{d"
    assert [text[span.content_start : span.content_end] for span in box_spans(text)] == [r"a \boxed{b} \}", "b"]
    assert [text[span.start : span.end] for span in box_spans(text)] == [r"\boxed {a \boxed{b} \}}", r"\boxed{b}"]
    assert [box.content for box in find_boxes(text)] == [r"a \boxed{b} \}", "c", "4"]


def test_boxes_inside_too_many_others_are_left_out():
    text = r"\boxed{1\boxed{2\boxed{3}}}"
    assert [span.start for span in box_spans(text, max_nesting=2)] == [0, 8]
    assert [span.start for span in box_spans(text)] == [0, 8, 16]


def test_a_line_break_before_the_word_is_no_box_of_an_answer():
    assert find_boxes(r"\\boxed{5}") == []
    assert [box.content for box in find_boxes(r"\\\boxed{5}")] == ["5"]


def test_boxes_inside_boxes_are_scanned_a_fixed_number_of_times(monkeypatch):
    """A scan for each level made the time quadratic."""
    scanned = []

    def counted(text, **options):
        scanned.append(len(text))
        return box_spans(text, **options)

    monkeypatch.setattr(boxes, "box_spans", counted)
    text = r"\boxed{ " * 2000 + "5" + " }" * 2000
    assert last_boxes(text) == ["5"]
    assert sum(scanned) <= 4 * len(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{ \fbox { \framebox{7} } }", "7"),
        (r"\boxed{\boxed 5.}", "5"),
        (r"\boxed{\boxed{}}", r"\boxed{}"),
        (r"\boxed{\boxed{1}\boxed{2}}", r"\boxed{1}\boxed{2}"),
        (r"\boxed{\boxed{\boxed{1}+2}}", r"\boxed{1}+2"),
    ],
)
def test_boxes_around_the_complete_answer_are_removed(text, content):
    assert last_box(text) == content
