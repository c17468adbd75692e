"""Columns: names with dots, lists of messages, forms of answers, and settings that match nothing."""

import json

import pandas as pd
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.config.settings import EvaluationSettings
from megatron_paint.data.columns import MISSING, field_of
from megatron_paint.data.problems import load_held_out
from tests.data.problem_files import load, row, write

STRUCTS = {"problem": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"}

DEEP = '["a",' + "[" * 100_000 + "]" * 100_000 + ',"b"]'  # deeper than a parser of JSON goes
MARK_ELSEWHERE = "column 'answer' has '####' in another place than a last line '#### RESULT'; write the answer alone"


def nested(number, **changes):
    """A row in the layout that verl writes."""
    return {
        "data_source": "math",
        "prompt": [{"role": "user", "content": f"What is {number} + {number}?"}],
        "reward_model": {"ground_truth": str(2 * number), "style": "rule"},
        "extra_info": {"index": f"p{number}"},
        **changes,
    }


@pytest.fixture
def file(tmp_path):
    return tmp_path / "train.jsonl"


class TestNamesWithDots:
    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("a", {"b": {"c": 1}, "d": [5, {"e": 6}]}),
            ("a.b.c", 1),
            ("a.d.0", 5),
            ("a.d.1.e", 6),
            ("x.y", "a column with a dot"),
            ("a.b", "a column of exactly this name"),
            ("none.b", MISSING),
            ("a.d.2", MISSING),
            ("a.d.-1", MISSING),
            ("a.b.c.d", MISSING),
            ("a.", MISSING),
            (".a", MISSING),
            ("a..b", MISSING),
            ("missing", MISSING),
        ],
    )
    def test_paths(self, column, value):
        values = {"a": {"b": {"c": 1}, "d": [5, {"e": 6}]}, "x.y": "a column with a dot", "none": None}
        if column == "a.b":
            values |= {"a.b": "a column of exactly this name"}
        assert field_of(values, column) == value

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
    def test_rows_of_structs(self, tmp_path, name):
        rows = [nested(number) for number in (1, 2, 3)]
        if name == "rows.parquet":
            pd.DataFrame(rows).to_parquet(tmp_path / name)
        else:
            write(tmp_path / name, rows)
        problems = load(tmp_path / name, solution_needed_by=None, columns=STRUCTS).problems
        assert [(one.id, one.problem, one.solution, one.answer) for one in problems] == [
            ("p1", "What is 1 + 1?", "", "2"),
            ("p2", "What is 2 + 2?", "", "4"),
            ("p3", "What is 3 + 3?", "", "6"),
        ]

    def test_a_column_of_exactly_this_name_comes_first(self, file):
        columns = STRUCTS | {"answer": "reward_model.ground_truth"}
        rows = [nested(1, **{"reward_model.ground_truth": "8"})]
        assert load(write(file, rows), solution_needed_by=None, columns=columns).problems[0].answer == "8"

    def test_a_field_that_no_row_has(self, file):
        source = write(file, [nested(1), nested(2)])
        message = (
            r"data\.columns\.answer: no row of .* has a column 'reward_model\.truth'\. The columns are data_source, "
            r"extra_info\.index, prompt, reward_model\.ground_truth, reward_model\.style\. Did you mean "
            r"'reward_model\.ground_truth'"
        )
        with pytest.raises(UserError, match=message):
            load(source, solution_needed_by=None, columns=STRUCTS | {"answer": "reward_model.truth"})

    def test_an_object_in_every_row(self, file):
        source = write(file, [nested(1), nested(2)])
        message = (
            r"data\.columns\.answer: in each of the 2 rows of .*, column 'reward_model' holds an object, not text\. "
            r"Name one of its fields: reward_model\.ground_truth, reward_model\.style$"
        )
        with pytest.raises(UserError, match=message):
            load(source, solution_needed_by=None, columns=STRUCTS | {"answer": "reward_model"}, on_bad_row="skip")

    def test_the_usual_names_of_other_sets(self, file):
        rows = [{"question": "Q?", "solution": "S.", "final_answer": "1"}] * 2
        with pytest.raises(UserError, match=r"columns\.problem: .* Did you mean 'question'"):
            load(write(file, rows))
        with pytest.raises(UserError, match=r"columns\.answer: .* Did you mean 'final_answer'"):
            load(write(file, rows), columns={"problem": "question"})


class TestSolutions:
    def test_which_objectives_need_them(self):
        needed = {name: ObjectiveSettings(name=name).needs.solutions for name in ("paint", "opsd", "sft", "grpo")}
        assert needed == {"paint": True, "opsd": True, "sft": True, "grpo": False}

    @pytest.mark.parametrize("solution", [..., None, "", "  ", [1], {"a": 1}, 5])
    def test_rows_without_solutions(self, file, solution):
        source = write(file, [row(1, solution=solution), row(2)])
        problems = load(source, solution_needed_by=None).problems
        assert [one.solution for one in problems] == ["", "It is \\boxed{4}."]

    def test_no_row_has_the_column(self, file):
        source = write(file, [row(1, solution=...), row(2, solution=...)])
        assert [one.answer for one in load(source, solution_needed_by=None).problems] == ["2", "4"]
        message = r"data\.columns\.solution: no row of .* has a column 'solution'\. .* objective\.name: sft needs it\.$"
        with pytest.raises(UserError, match=message):
            load(source, solution_needed_by="objective.name: sft")

    @pytest.mark.parametrize(("value", "fault"), [(None, "is null"), ("", "is empty"), ([2], "holds a list, not text")])
    def test_no_row_has_a_value(self, file, value, fault):
        source = write(file, [row(1, solution=value), row(2, solution=value)])
        message = (
            rf"data\.columns\.solution: in each of the 2 rows of .*, column 'solution' {fault}\. objective\.name: "
            r"paint needs it\."
        )
        for on_bad_row in ("error", "skip"):
            with pytest.raises(UserError, match=message):
                load(source, solution_needed_by="objective.name: paint", on_bad_row=on_bad_row)

    def test_one_row_has_none(self, file):
        source = write(file, [row(1), row(2, solution="")])
        message = r"train\.jsonl:2: column 'solution' is empty; objective\.name: paint needs it; correct the row"
        with pytest.raises(UserError, match=message):
            load(source, solution_needed_by="objective.name: paint")

    def test_a_column_that_a_setting_names(self, file):
        source = write(file, [row(1, solution=...)])
        with pytest.raises(UserError, match=r"data\.columns\.solution: no row of .* has a column 'worked'"):
            load(source, solution_needed_by=None, columns={"solution": "worked"})
        settings = EvaluationSettings(problems=source)
        assert load_held_out(settings).problems[0].answer == "2"


class TestMessages:
    def system(self, number, text):
        return nested(number, prompt=[{"role": "system", "content": text}, *nested(number)["prompt"]])

    def test_one_system_message_is_left_out_and_said(self, file):
        source = write(
            file, [self.system(1, "Reason step by step."), nested(2), self.system(3, "Reason step by step.")]
        )
        problems = load(source, solution_needed_by=None, columns=STRUCTS)
        assert [one.problem for one in problems.problems] == ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3?"]
        assert problems.notes == (
            f"{source}: the system message 'Reason step by step.' is left out; the instructions are those of the "
            "templates in the section prompts",
        )

    def test_system_messages_that_differ_belong_to_the_problems(self, file):
        source = write(file, [self.system(1, "In base 8."), nested(2), self.system(3, "In base 16.")])
        message = r"system messages of .* differ \(first at .*:1 and .*:3\).*write them into the user messages"
        with pytest.raises(UserError, match=message):
            load(source, solution_needed_by=None, columns=STRUCTS)

    @pytest.mark.parametrize("content", ["What is it?", [{"type": "text", "text": "What is it?"}]])
    def test_contents(self, file, content):
        source = write(file, [nested(1, prompt=[{"role": "user", "content": content, "name": "u"}])])
        assert load(source, solution_needed_by=None, columns=STRUCTS).problems[0].problem == "What is it?"

    def test_messages_as_json_text(self, file):
        source = write(file, [nested(1, prompt=json.dumps(nested(1)["prompt"]))])
        assert load(source, solution_needed_by=None, columns=STRUCTS).problems[0].problem == "What is 1 + 1?"

    def test_a_formula_that_looks_like_a_list(self, file):
        assert load(write(file, [row(problem="[{1, 2}, {3}] has which union?")])).problems[0].problem[:9] == "[{1, 2}, "

    @pytest.mark.parametrize(
        ("prompt", "reason"),
        [
            ([{"role": "user", "content": "a"}] * 2, r"holds 2 messages \(user, user\)"),
            ([{"role": role, "content": "a"} for role in ("user", "assistant")], r"2 messages \(user, assistant\)"),
            ([{"role": "assistant", "content": "a"}], r"holds 1 message \(assistant\)"),
            ([{"role": "user"}], "a list of objects with role, not messages"),
            ([{"from": "human", "value": "a"}], "a list of objects with from, value, not messages"),
            ([{"role": "user", "content": [{"type": "image"}]}], "a message whose content is not one text"),
            ([{"role": "user", "content": None}], "a message whose content is not one text"),
            ([{"role": "user", "content": " "}], "column 'prompt' is empty"),
            ([{"role": [1], "content": "a"}], r"holds 1 message \(\[1\]\)"),
            (repr(nested(1)["prompt"]), "holds printed messages; save the rows as JSON lines or Parquet"),
            ([], "holds a list, not text"),
        ],
    )
    def test_what_is_no_problem(self, file, prompt, reason):
        source = write(file, [nested(1), nested(2, prompt=prompt), nested(3)])
        with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{reason}.*; correct the row"):
            load(source, solution_needed_by=None, columns=STRUCTS)
        source = write(file, [nested(1, prompt=prompt), nested(2, prompt=prompt)])
        with pytest.raises(UserError, match=rf"data\.columns\.problem: in each of the 2 rows.*{reason}") as raised:
            load(source, solution_needed_by=None, columns=STRUCTS, on_bad_row="skip")
        assert "on_bad_row" not in str(raised.value)

    def test_an_entry_of_a_conversation(self, file):
        turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "It is \\boxed{4}."}]
        columns = {"problem": "turns.0.value", "solution": "turns.1.value"}
        problem = load(write(file, [{"id": "p", "turns": turns, "answer": "4"}]), columns=columns).problems[0]
        assert (problem.problem, problem.solution) == ("Q?", "It is \\boxed{4}.")


class TestAnswers:
    @pytest.mark.parametrize(
        ("written", "answer"),
        [
            ("Each holds 14, so 3*14=<<3*14=42>>42 jars.\n#### 42", "42"),
            ("2*1250=<<2*1250=2500>>2500.\n#### 2,500", "2500"),
            ("#### -3,000.50 \n", "-3000.50"),
            ("30 + 18 = 48, and 2 more.\n#### \\frac{1}{2}", "\\frac{1}{2}"),
            ("#### 1\n#### 2", "2"),
            ("x.\n#### (1, 200)", "(1, 200)"),
            ("#### Solution\nIt is 4.\n#### 4", "4"),
            ('["2 and 2.\\n#### 4"]', "4"),
            (DEEP, DEEP),
            ('["\\\\frac{1}{2}"]', "\\frac{1}{2}"),
            ("[1, 2]", "[1, 2]"),
            ('["a" and "b"]', '["a" and "b"]'),
        ],
    )
    def test_forms(self, file, written, answer):
        problems = load(write(file, [row(answer=written, solution="S.")]))
        assert problems.problems[0].answer == answer
        assert len(problems.notes) == (written != answer)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("It is so.\n####  ", "column 'answer' has nothing after '####'"),
            ("#### Solution\nIt is 4.", MARK_ELSEWHERE),
            ("It is so.\n\n  #### Final answer\n4", MARK_ELSEWHERE),
            ("#### 4\nThis is even.", MARK_ELSEWHERE),
            ("It is so.\n##### 4", MARK_ELSEWHERE),
            ("the sign #### in a sentence", MARK_ELSEWHERE),
            ('["the sign #### in a sentence"]', MARK_ELSEWHERE),
            ('["1", "2"]', "column 'answer' holds a list of 2 answers; write one answer a row"),
            (["4"], r"column 'answer' holds a list, not text; its one entry is the column 'answer\.0'"),
        ],
    )
    def test_what_is_no_answer(self, file, answer, reason):
        with pytest.raises(UserError, match=rf"train\.jsonl:2: {reason}"):
            load(write(file, [row(1), row(2, answer=answer), row(3)]))

    def test_forms_are_said(self, file):
        rows = [row(1, answer="a\n#### 2"), row(2), row(3, answer='["6"]')]
        assert load(write(file, rows)).notes == (
            f"{file}: 1 of 3 answers ends in '#### RESULT'; the result is the answer",
            f"{file}: 1 of 3 answers is a list of one text; this text is the answer",
        )

    def test_a_list_in_every_row(self, file):
        source = write(file, [row(number, answer=[str(2 * number)]) for number in (1, 2)])
        with pytest.raises(
            UserError, match=r"columns\.answer: in each of the 2 rows .* Name one of its entries: answer"
        ):
            load(source)
        assert [one.answer for one in load(source, columns={"answer": "answer.0"}).problems] == ["2", "4"]

    def test_answers_that_never_equal_their_solutions(self, file):
        class Wrong:
            outcome, correct = "wrong", False

        source = write(file, [row(1, answer="7"), row(2, answer="9")])
        message = (
            r"data\.columns\.answer: in each of the 2 rows of .*, column 'answer' differs from the solution's last box"
            r"\. The first: '7' and '2'\. Name the right columns, or set data\.check_answers: false$"
        )
        with pytest.raises(UserError, match=message):
            load(source, grade=lambda text, answer: Wrong)


class TestIds:
    def test_most_ids_repeat(self, file):
        source = write(file, [row(1), row(2)] * 3)
        message = (
            r"data\.columns\.id: 4 of 6 rows of .* have the id of an earlier row; the first is .*:3: id 'p1' is "
            r"already used at .*:1\. Set data\.columns\.id: null"
        )
        for on_bad_row in ("error", "skip"):
            with pytest.raises(UserError, match=message):
                load(source, on_bad_row=on_bad_row)
        numbered = load(source, columns={"id": None})
        assert [one.id for one in numbered.problems] == [f"train:{number}" for number in range(1, 7)]
        assert numbered.notes == ()

    def test_a_few_ids_repeat(self, file):
        source = write(file, [row(1), row(2), row(3), row(2)])
        with pytest.raises(UserError, match=r"train\.jsonl:4: id 'p2' is already used at .*:2; correct the row"):
            load(source)
        assert [one.id for one in load(source, on_bad_row="skip").problems] == ["p1", "p2", "p3"]

    @pytest.mark.parametrize("numbers", [[1, 2], [1.0, 2.0]])
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
    def test_ids_that_are_whole_numbers(self, tmp_path, name, numbers):
        table = pd.DataFrame([row(n, id=id) for n, id in enumerate(numbers, start=1)])
        if name == "rows.parquet":
            table.to_parquet(tmp_path / name)
        else:
            write(tmp_path / name, table.to_dict("records"))
        assert [one.id for one in load(tmp_path / name).problems] == ["1", "2"]

    @pytest.mark.parametrize("number", [1.5, float("nan"), float("inf"), 1e300, True])
    def test_ids_that_are_other_numbers(self, tmp_path, number):
        pd.DataFrame([row(1, id=number)]).to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=r"column 'id' (holds|is)"):
            load(tmp_path / "rows.parquet")

    def test_ids_that_are_null(self, file):
        source = write(file, [row(1, id=None), row(2, id=None)])
        with pytest.raises(UserError, match=r"data\.columns\.id: in each .* is null\. Set data\.columns\.id: null"):
            load(source)


def test_all_rows_are_bad_for_different_reasons(file):
    source = write(file, [row(1, answer=""), row(2, problem=""), row(3, solution="")])
    for on_bad_row in ("error", "skip"):
        with pytest.raises(
            UserError, match=r"has no usable problem: all 3 rows are bad\. The first is .*:1: "
        ) as raised:
            load(source, on_bad_row=on_bad_row)
        assert "on_bad_row" not in str(raised.value)
