"""Anchors of prose by hand: dates, quantities, quoted terms and names; any text; where a text may be cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings

from megatron_paint.masker.dates import dates_in
from megatron_paint.masker.names import names_in
from megatron_paint.masker.overlap import measure_overlap
from megatron_paint.masker.quantities import quantities_in
from megatron_paint.masker.text_anchors import extract_text, find_text, text_parts
from tests.masker.code_text import any_prose
from tests.masker.cutting import characters, cut

SOLUTION = (
    "The United Nations was founded on 24 October 1945 in San Francisco. It had 51 members, about 26% of all. "
    'Its "founding conference" cost $3.5 million. So the city is \\boxed{San Francisco}.'
)


def test_anchors_by_hand():
    extracted = extract_text("In which city were the United Nations founded?", SOLUTION)
    assert [(anchor.kind, anchor.text) for anchor in extracted] == [
        ("boxed", "SanFrancisco"),
        ("date", "1945-10-24"),
        ("quantity", "51"),
        ("quantity", "26%"),
        ("quantity", "3500000 dollar"),
        ("quote", "founding conference"),
        ("name", "San Francisco"),
    ]


def test_a_rollout_in_other_words():
    rollout = (
        "Founded October 24th, 1945, in San\nFrancisco, with 51 states, 26 percent of the world; the Founding "
        "conference took 3,500,000 dollars."
    )
    measured = measure_overlap(problem="", solution=SOLUTION, rollout=rollout, anchors="text")
    missing = [anchor.text for anchor in measured.anchors if not anchor.found]
    assert missing == ["United Nations"]
    assert measured.score == 7 / 8


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("2020-03-05", ["2020-03-05"]),
        ("on 5 March 2020.", ["2020-03-05"]),
        ("the 5th of March, 2020", ["2020-03-05"]),
        ("March 5, 2020", ["2020-03-05"]),
        ("Mar. 5th 2020", ["2020-03-05"]),
        ("5.3.2020", ["2020-03-05"]),
        ("25/12/2020 and 12/25/2020", ["2020-12-25", "2020-12-25"]),
        ("3/4/2020", ["3/4/2020"]),  # the order is not known
        ("3/3/2020", ["2020-03-03"]),
        ("March 2020", ["2020-03"]),
        ("Sept. 7", ["--09-07"]),
        ("7 May", ["--05-07"]),
        ("May 45", []),
        ("2020-13-05, 32.1.2020 and 0/0/2020", []),
        ("we may 5 times march 3", []),
        ("1.2.3.2020", []),
        ("Marching 5", []),
    ],
)
def test_dates(text, forms):
    found = list(dates_in(text))
    assert [date.text for date in found] == forms
    assert all(text[date.start : date.end].strip() for date in found)


@pytest.mark.parametrize(
    ("solution", "rollout", "is_found"),
    [
        ("on 5 March", "on March 5, 2020", True),
        ("in March 2020", "on 2020-03-05", True),
        ("on 5 March 2020", "on 5 March", False),
        ("on 5 March 2020", "on 5 March 2021", False),
        ("it takes 90 minutes", "it takes 1.5 hours", True),
        ("it takes 90 minutes", "it takes 90 days", False),
        ("a mass of 1,500 g", "a mass of 1.5 kg", True),
        ("it costs $12", "it costs 12 dollars", True),
        ("it costs $12", "it costs €12", False),
        ("it costs $12", "it has 12 legs", False),
        ("there are 12 legs", "it costs $12", True),  # the bare number
        ("12 % of it", "12 per cent of it", True),
        ("12 % of it", "12 of them", False),
        ("about 2 million people", "2,000,000 people", True),
        ("there are 112 legs", "there are 12 legs", False),
        ("Marie Curie won. They met Marie Curie.", "and Marie Curie's prize", True),
        ("They met Marie Curie.", "they met marie curie", False),
        ("They met Marie Curie.", "They met Marie Curies", False),
        ("the “Golden rule”", "the golden  rule.", True),
        ("the “Golden rule”", "the golden rules", False),
    ],
)
def test_found_in_another_form(solution, rollout, is_found):
    measured = measure_overlap(problem="", solution=solution, rollout=rollout, anchors="text")
    assert [anchor.found for anchor in measured.anchors] == [is_found]


@pytest.mark.parametrize(
    ("text", "quantities"),
    [
        ("5 km/h", ["25/18 length time^-1"]),  # 5 / 3.6 has no finite decimal
        ("12 inches", ["0.3048 length"]),
        ("5 in the morning", ["5"]),
        ("3 dozen", ["36"]),
        ("1/3", ["1", "3"]),
        ("v1.2.3", []),
        ("-5 m", ["5 length"]),
        ("1,23 and 1,234", ["1", "23", "1234"]),
        ("9" * 50, ["9" * 50]),
        ("USD 5, 5 USD", ["5 dollar", "5 dollar"]),
        ("10th, 3D and 5km", ["5000 length"]),
        ("(13,57)", ["13", "57"]),
        ("", []),
    ],
)
def test_quantities(text, quantities):
    assert [quantity.text for quantity in quantities_in(text)] == quantities


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("They met Marie Curie in Paris.", ["Marie Curie", "Paris"]),
        ("Marie Curie won a prize.", []),  # only at the beginning of a sentence
        ("Marie Curie won. Later Marie Curie died.", ["Marie Curie", "Marie Curie"]),
        ("Marie Curie won. They liked Marie Curie.", ["Marie Curie", "Marie Curie"]),
        ("The Hague is here. The United States, too.", ["Hague", "United States"]),
        ("She is from the University of Cape Town.", ["University of Cape Town"]),
        ("He asked Dr. Smith and J. R. Tolkien.", ["Dr. Smith", "J. R. Tolkien"]),
        ("NASA and I went on Monday in March.", ["NASA"]),
        ("We saw Berlin\u2019s wall.", ["Berlin"]),
        ("A list:\n- Apples are red\n- Pears are green", []),
        ("Is it Rome, Italy?", ["Rome", "Italy"]),
        ("no names here", []),
        ("In the École Normale we met Émile Zola.", ["École Normale", "Émile Zola"]),
    ],
)
def test_names(text, names):
    found = names_in(text)
    assert [name.text for name in found] == names
    assert all(" ".join(text[name.start : name.end].split()) == name.text for name in found)


@pytest.mark.parametrize("text", ["It has 0.5GB of room.", "We met Anna \u201cthe first\u201d Bell there."])
def test_an_anchor_is_found_in_its_own_text(text):
    assert all(find_text(extract_text("", text), text))


def test_a_name_does_not_continue_behind_a_box():
    text = r"We met Anna \boxed{5} Bell there."
    assert [anchor.text for anchor in extract_text("", text) if anchor.kind == "name"] == ["Anna", "Bell"]


def test_what_the_problem_has_is_no_anchor():
    problem = 'What did Marie Curie do on 2020-03-05 with 5 km of "blue wire"?'
    solution = "We know that Marie Curie, on March 5, 2020, took 5,000 m of “blue wire” and 1 knife with 1 kg."
    assert [anchor.text for anchor in extract_text(problem, solution)] == ["1000 mass"]


class TestCut:
    def test_no_cut_inside_an_anchor(self):
        prefixes = {cut(SOLUTION, number / 400, characters, parts=text_parts) for number in range(401)}
        for piece in (
            "24 October 1945",
            "San Francisco",
            "United Nations",
            "$3.5 million",
            "founding conference",
            "26%",
        ):
            start = SOLUTION.index(piece)
            inside = {len(prefix) for prefix in prefixes} & set(range(start + 1, start + len(piece)))
            assert inside == set(), (piece, inside)

    def test_a_dot_in_a_name_ends_no_sentence(self):
        text = "We asked Dr. Smith about it. He knew it."
        prefixes = {cut(text, number / 100, characters, unit="segment", parts=text_parts) for number in range(101)}
        assert prefixes == {"", "We asked Dr. Smith about it.", text}

    def test_prices_open_no_formula(self):
        text = "It costs $5. Then it costs $6. End of it."
        prefixes = {cut(text, number / 100, characters, unit="segment", parts=text_parts) for number in range(101)}
        assert prefixes == {"", "It costs $5.", "It costs $5. Then it costs $6.", text}


def test_a_solution_reproduces_itself():
    measured = measure_overlap(problem="", solution=SOLUTION, rollout=SOLUTION, anchors="text")
    assert measured.score == 1


@settings(max_examples=300, deadline=None)
@given(any_prose, any_prose, any_prose)
def test_any_text(problem, solution, rollout):
    extracted = extract_text(problem, solution)
    assert extracted == extract_text(problem, solution)
    if "boxed" not in solution:
        assert all(find_text(extracted, solution))
    assert len({anchor.text for anchor in extracted}) == len(extracted)
    assert all(anchor.text for anchor in extracted)
    assert len(find_text(extracted, rollout)) == len(extracted)
    for place in (*dates_in(solution), *quantities_in(solution), *names_in(solution)):
        assert 0 <= place.start < place.end <= len(solution)


@settings(max_examples=300, deadline=None)
@given(any_prose)
def test_parts_of_any_text(text):
    for spans in text_parts(text):
        assert all(0 <= span.start < span.end <= len(text) for span in spans)
        assert all(one.end <= other.start for one, other in pairwise(spans))
    for share in (0, 0.3, 0.7, 1):
        assert text.startswith(cut(text, share, characters, parts=text_parts))


HOSTILE = {
    "capitals": "Aa " * 33_000,
    "connectors": "Aa of the " * 10_000,
    "quotes": '"a' * 50_000,
    "backticks": "`" * 100_000,
    "digits": "1" * 100_000,
    "groups": "111," * 25_000,
    "months": "May " * 25_000,
    "dates": "5 May 2020 " * 9_000,
    "dots": "1.1.1" * 20_000,
    "currency": "$" * 100_000,
    "units": "5 km/" * 20_000,
    "initials": "A. " * 33_000,
    "dashes": "a-" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_on_hostile_text_is_bounded(name):
    """100,000 characters end; pytest's time limit would end a quadratic search."""
    text = HOSTILE[name]
    measured = measure_overlap(problem=text[:30_000], solution=text, rollout=text, anchors="text")
    assert 0 <= measured.score <= 1
    text_parts(text)
