"""Domains and choices of rows: what a row may name, what is refused, and which checks hold for which grader."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.domains import DomainSettings
from megatron_paint.config.settings import ColumnSettings, DataSettings, EvaluationSettings
from megatron_paint.data.problems import load_held_out, load_problems
from megatron_paint.grading.grade import Grade
from tests.data.problem_files import row, write

DOMAINS = {
    "code": DomainSettings(anchors="code", grader="my_tests:run"),
    "quiz": DomainSettings(grader="choice"),
    "words": DomainSettings(grader="exact"),
}


@pytest.fixture
def load(tmp_path):
    def call(rows, *, grade=None, columns=None, **options):
        if columns is None:
            columns = [name for name in ("domain", "choices") if any(name in one for one in rows)]
        settings = DataSettings(
            train=write(tmp_path / "train.jsonl", rows),
            problems_per_step=1,
            columns=ColumnSettings(**{name: name for name in columns}),
            **options,
        )
        return load_problems(settings, domains=DOMAINS, grade=grade)

    return call


def test_rows_without_the_setting_are_mathematics(tmp_path):
    source = write(tmp_path / "train.jsonl", [row(1, domain="code"), row(2)])
    problems = load_problems(DataSettings(train=source, problems_per_step=1)).problems
    assert [(problem.domain, problem.choices) for problem in problems] == [("math", ())] * 2


def test_a_row_names_its_domain_or_has_the_default(load):
    rows = [row(1, domain="code"), row(2), row(3, domain=None), row(4, domain=""), row(5, domain="math")]
    assert [problem.domain for problem in load(rows).problems] == ["code", "math", "math", "math", "math"]
    assert [problem.domain for problem in load(rows, domain="words").problems] == [
        *("code", "words", "words", "words", "math")
    ]


def test_a_default_alone(load):
    assert load([row(1)], columns=(), domain="code").problems[0].domain == "code"


def test_an_unknown_domain_is_a_bad_row_that_names_the_known_ones(load):
    rows = [row(1, domain="code"), row(2, domain="cod")]
    message = (
        r"train\.jsonl:2: column 'domain' names the domain 'cod'; the domains are code, quiz, words, math; correct"
    )
    with pytest.raises(UserError, match=message):
        load(rows)
    problems = load(rows, on_bad_row="skip")
    assert [problem.id for problem in problems.problems] == ["p1"]
    assert len(problems.bad_rows) == 1


def test_unknown_domains_everywhere_are_a_fault_of_the_settings(load):
    message = (
        r"^data\.columns\.domain: in each of the 2 rows of .*, column 'domain' names an unknown domain\. The first is "
        r"'cod', and the domains are code, quiz, words, math\. Add yours to the section domains$"
    )
    with pytest.raises(UserError, match=message):
        load([row(1, domain="cod"), row(2, domain="cods")], on_bad_row="skip")


def test_a_column_that_no_row_has(load):
    with pytest.raises(UserError, match=r"data\.columns\.domain: no row of .* has a column 'domain'\..*'subject'"):
        load([row(1, subject="code")], columns=("domain",))


@pytest.mark.parametrize("value", [5, ["code"], {"a": 1}, True])
def test_a_domain_that_is_no_text(load, value):
    with pytest.raises(UserError, match=r"train\.jsonl:2: column 'domain' holds "):
        load([row(1, domain="code"), row(2, domain=value)])


class TestChoices:
    @pytest.mark.parametrize(
        ("written", "choices"),
        [
            (["red", "blue"], ("red", "blue")),
            ([1, 2.5, "x"], ("1", "2.5", "x")),
            ('["red", "blue"]', ("red", "blue")),  # a field of CSV
            (None, ()),
            ("", ()),
        ],
    )
    def test_forms(self, load, written, choices):
        assert load([row(1, domain="quiz", answer="B", choices=written)]).problems[0].choices == choices

    @pytest.mark.parametrize("written", ["red", ["red"], {"A": "red"}, ["x"] * 27, '{"A": "red"}', 7])
    def test_what_is_no_list_of_choices(self, load, written):
        with pytest.raises(UserError, match=r"column 'choices' holds no list of 2 to 26 choices"):
            load([row(1, domain="quiz", answer="A", choices=["a", "b"]), row(2, domain="quiz", choices=written)])

    def test_an_answer_is_a_letter_or_a_text(self, load):
        good = [
            row(n, domain="quiz", answer=answer, choices=["red", "5"]) for n, answer in enumerate(("A", "b", "Red", 5))
        ]
        assert len(load(good)) == 4
        bad = [*good, row(9, domain="quiz", answer="C", choices=["red", "5"])]
        message = r"train\.jsonl:5: answer 'C' is neither a letter from A to B nor the text of one of the choices"
        with pytest.raises(UserError, match=message):
            load(bad)

    def test_without_choices_an_answer_is_a_letter(self, load):
        assert load([row(1, domain="quiz", answer="(D)")]).problems[0].answer == "(D)"
        message = r"answer 'red' is not the letter of a choice; for its text, name data\.columns\.choices"
        with pytest.raises(UserError, match=message):
            load([row(1, domain="quiz", answer="A"), row(2, domain="quiz", answer="red")], columns=("domain",))


def test_answers_are_compared_with_boxes_in_mathematics_alone(load):
    asked = []

    def grade(pairs):
        asked.extend(pairs)
        return [Grade(correct=True, extracted="", outcome="right") for _ in pairs]

    rows = [row(number, domain=domain, answer="17") for number, domain in enumerate(("math", "code", "words"), start=1)]
    load(rows, grade=grade)
    assert [solution for solution, _ in asked] == [rows[0]["solution"]]


def test_the_answer_of_a_function_of_the_user_is_taken_as_it_is(load):
    program = "#### a comment\nassert f(1) == [2]\n" * 9
    loaded = load([row(1, domain="code", answer=program, solution="def f(x): return [x + 1]"), row(2, domain="code")])
    assert loaded.problems[0].answer == program
    assert loaded.warnings == ()  # neither that it is long nor that the solution has no box


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (["1", '["2"]'], r'["1", "[\"2\"]"]'),
        ({"in": [1, None], "out": "\u00e9"}, r'{"in": [1, null], "out": "\u00e9"}'),
        (0.5, "0.5"),
        (7, "7"),
        ('["one"]', '["one"]'),
    ],
)
def test_a_function_reads_lists_and_objects_as_json(load, written, answer):
    assert load([row(1, domain="code", answer=written), row(2)]).problems[0].answer == answer


@pytest.mark.parametrize("written", [None, "", " ", float("nan")])
def test_an_answer_that_a_function_cannot_read(load, written):
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*'answer' "):
        load([row(1, domain="code", answer=written), row(2)])


def test_held_out_problems(tmp_path):
    source = write(tmp_path / "held_out.jsonl", [row(1, kind="quiz", answer="B"), row(2)])
    settings = EvaluationSettings(problems=source, columns=ColumnSettings(domain="kind"), domain="words")
    assert [problem.domain for problem in load_held_out(settings, domains=DOMAINS).problems] == ["quiz", "words"]
    with pytest.raises(UserError, match=r"column 'kind' names the domain 'quiz'; the domains are words, math; correct"):
        load_held_out(settings, domains={"words": DOMAINS["words"]})
