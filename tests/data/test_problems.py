"""Problems: every kind of source and every way in which a row can be bad."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import DataSettings, EvaluationSettings
from megatron_paint.data.problems import load_held_out, load_problems
from megatron_paint.grading.grade import Rules
from megatron_paint.grading.grade import grade as real_grade
from megatron_paint.records import Problem
from tests.data.problem_files import load, row, write

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")


@dataclass
class Verdict:
    outcome: str

    @property
    def correct(self):
        return self.outcome == "right"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "train.jsonl"


class TestSources:
    def test_jsonl(self, file):
        problems = load(write(file, [row(1), row(2, extra=[1, 2])])).problems
        assert problems == (
            Problem(
                id="p1",
                problem="What is 1 + 1?",
                solution="It is \\boxed{2}.",
                answer="2",
                source=f"{file}:1",
            ),
            Problem(
                id="p2",
                problem="What is 2 + 2?",
                solution="It is \\boxed{4}.",
                answer="4",
                source=f"{file}:2",
            ),
        )

    def test_blank_lines_and_byte_order_mark(self, file):
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(1)).encode() + b"\n\n  \r\n" + json.dumps(row(2)).encode())
        problems = load(file).problems
        assert [problem.source for problem in problems] == [f"{file}:1", f"{file}:4"]

    def test_text_is_kept_byte_for_byte(self, file):
        text = "  a\r\n\tb \u00a0 e\u0301 \u2028 c \n"
        assert load(write(file, [row(problem=text, solution=text)])).problems[0].problem == text

    def test_parquet(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "train.parquet"
        pq.write_table(pa.Table.from_pylist([row(number) for number in range(1, 4)]), path)
        problems = load(path).problems
        assert [problem.id for problem in problems] == ["p1", "p2", "p3"]
        assert problems[2].source == f"{path}:3"

    def test_parquet_with_broken_utf8(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "train.parquet"
        raw = pa.array([b"fine", b"bad \xff"], type=pa.binary())
        text = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
        columns = {name: [row(1)[name], row(2)[name]] for name in ("id", "solution", "answer")}
        pq.write_table(pa.table({"problem": text, **columns}), path)
        with pytest.raises(UserError, match=r"train\.parquet:2: a text of the row is not UTF-8"):
            load(path)

    def test_no_parquet(self, tmp_path):
        (tmp_path / "train.parquet").write_text("not parquet")
        with pytest.raises(UserError, match=r"train\.parquet: not a readable Parquet file"):
            load(tmp_path / "train.parquet")

    def test_datasets_folder(self, tmp_path):
        import datasets

        table = datasets.Dataset.from_list([row(1), row(2)])
        table.save_to_disk(str(tmp_path / "one"))
        assert len(load(tmp_path / "one")) == 2
        datasets.DatasetDict({"dev": table}).save_to_disk(str(tmp_path / "split"))
        problems = load(tmp_path / "split", split="dev").problems
        assert problems[1].source == f"{tmp_path / 'split'}[dev]:2"
        with pytest.raises(UserError, match="cannot load its split 'train'"):
            load(tmp_path / "split")

    def test_datasets_reads_folders_of_files(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        folder = tmp_path / "data"
        folder.mkdir()
        write(folder / "train.jsonl", [row(1), row(2), row(3)])
        assert len(load(folder, format="datasets")) == 3

    def test_other_column_names(self, file):
        source = write(file, [{"uid": 7, "question": "Q?", "rationale": "R.", "final": "A"}])
        columns = {"id": "uid", "problem": "question", "solution": "rationale", "answer": "final"}
        problem = load(source, columns=columns).problems[0]
        assert (problem.id, problem.problem, problem.solution, problem.answer) == ("7", "Q?", "R.", "A")

    def test_absent_file(self, file, tmp_path):
        write(tmp_path / "train.jsonl", [row()])
        with pytest.raises(
            UserError, match=r"data\.train: there is no file .*trian\.jsonl\. Did you mean 'train\.jsonl'"
        ):
            load(tmp_path / "trian.jsonl")

    def test_empty_file(self, file):
        file.write_text("\n\n")
        with pytest.raises(UserError, match=r"data\.train: .* has no rows"):
            load(file)

    def test_unknown_ending(self, tmp_path):
        path = tmp_path / "train.txt"
        path.write_text("{}")
        with pytest.raises(
            UserError, match=r"the format is unknown from this ending; set data\.format: json, csv or parquet"
        ):
            load(path)
        write(path, [row()])
        assert len(load(path, format="jsonl")) == 1

    def test_folder_as_jsonl(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.train: .* cannot be read"):
            load(tmp_path, format="jsonl")

    @needs_data
    def test_real_files(self):
        assert len(load(DATA / "math_train.jsonl")) == 7497
        held_out = load_held_out(EvaluationSettings(problems=str(DATA / "aime2025.jsonl")))
        assert len(held_out.problems) == 30
        assert {problem.solution for problem in held_out.problems} == {""}


BAD_ROWS = {
    "no problem": (row(2, problem=...), "column 'problem' is missing"),
    "null": (row(2, problem=None), "column 'problem' is missing"),
    "empty": (row(2, problem=""), "column 'problem' is empty"),
    "blank": (row(2, problem=" \n\t"), "column 'problem' is empty"),
    "list": (row(2, problem=["a"]), "column 'problem' holds a list, not text"),
    "number as problem": (row(2, problem=3), "column 'problem' holds a number, not text"),
    "no solution": (row(2, solution=...), "column 'solution' is missing"),
    "empty solution": (row(2, solution=""), "column 'solution' is empty"),
    "object as solution": (row(2, solution={}), "column 'solution' holds an object, not text"),
    "no answer": (row(2, answer=...), "column 'answer' is missing"),
    "empty answer": (row(2, answer=""), "column 'answer' is empty"),
    "truth as answer": (row(2, answer=True), "column 'answer' holds true or false, not text"),
    "list as answer": (row(2, answer=[4]), "column 'answer' holds a list, not text"),
    "infinite answer": (row(2, answer=math.inf), "column 'answer' holds the number inf; write the answer as text"),
    "tiny answer": (row(2, answer=1e-7), "column 'answer' holds the number 1e-07; write the answer as text"),
    "no id": (row(2, id=...), "column 'id' is missing"),
    "null id": (row(2, id=None), "column 'id' is missing"),
    "empty id": (row(2, id=""), "column 'id' is empty"),
    "fraction as id": (row(2, id=1.5), "column 'id' holds a number, not text"),
    "same id": (row(2, id="p1"), r"id 'p1' is already used at .*train\.jsonl:1"),
    "lone surrogate": (b'{"id": "p2", "problem": "a\\ud800"}', "broken Unicode: a lone surrogate at character 1"),
    "broken UTF-8": (b'{"id": "p\xff2"}', "not UTF-8: byte 0xff at byte 9 of the line"),
    "broken JSON": (b'{"id": "p2",}', "not JSON: .* at character 1[12] of the line"),
    "cut line": (b'{"id": "p2", "prob', "not JSON: Unterminated string"),
    "array": (b"[1, 2]", "contains a list; a line must be one JSON object"),
    "deep": (b"[" * 200_000, "not readable as JSON"),
}


class TestBadRows:
    @pytest.mark.parametrize("kind", BAD_ROWS)
    def test_named_by_file_and_line(self, file, kind):
        bad, reason = BAD_ROWS[kind]
        source = write(file, [row(1), bad, row(3)])
        with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{reason}.*set data\.on_bad_row: skip"):
            load(source)

    @pytest.mark.parametrize("kind", BAD_ROWS)
    def test_bad_rows_are_left_out_and_counted(self, file, kind):
        problems = load(write(file, [row(1), BAD_ROWS[kind][0], row(3)]), on_bad_row="skip")
        assert [problem.id for problem in problems.problems] == ["p1", "p3"]
        assert len(problems.bad_rows) == 1
        assert problems.notes[-1].startswith(f"{file}: 1 of 3 rows left out: {file}:2: ")

    def test_the_first_and_the_number_of_others(self, file):
        source = write(file, [row(1), row(2, answer=""), row(3, problem=""), row(4, problem="")])
        with pytest.raises(UserError, match=r"train\.jsonl:2: .* \(2 more bad rows of 4\); correct the row"):
            load(source)

    def test_first_few_reasons(self, file):
        problems = load(write(file, [row(1), *[row(2, answer="")] * 9]), on_bad_row="skip")
        assert len(problems.bad_rows) == 9
        assert problems.notes[-1].count("column 'answer' is empty") == 3
        assert problems.notes[-1].endswith("; ...")

    def test_no_good_row(self, file):
        with pytest.raises(UserError, match=r"data\.train: .* has no usable problem"):
            load(write(file, [row(1, answer="")]), on_bad_row="skip")

    @pytest.mark.parametrize("on_bad_row", ["error", "skip"])
    @pytest.mark.parametrize("role", ["problem", "solution", "answer"])
    def test_a_column_that_no_row_has(self, file, role, on_bad_row):
        source = write(file, [{**row(1, **{role: ...}), role + "s": "x"}])
        message = rf"data\.columns\.{role}: no row of .* has a column '{role}'\. The columns are .* mean '{role}s'"
        with pytest.raises(UserError, match=message):
            load(source, on_bad_row=on_bad_row)

    def test_an_id_column_that_was_asked_for(self, file):
        with pytest.raises(UserError, match=r"data\.columns\.id: no row of .* has a column 'uid'"):
            load(write(file, [row(1)]), columns={"id": "uid"})

    def test_no_ids_at_all(self, file):
        problems = load(write(file, [row(1, id=...), b"", row(2, id=...)]))
        assert [problem.id for problem in problems.problems] == ["train:1", "train:3"]
        assert problems.notes == (f"{file}: no row has a column 'id'; file name and line are used as id",)

    @pytest.mark.parametrize(
        ("answer", "text"),
        [(42, "42"), (-7, "-7"), (42.0, "42"), (0.5, "0.5"), (-2.25, "-2.25"), (10**30, "1" + "0" * 30)],
    )
    def test_numbers_as_answers(self, file, answer, text):
        assert load(write(file, [row(answer=answer, solution="S.")])).problems[0].answer == text


class TestAnswers:
    def never(self, *_, **__):
        raise AssertionError("the texts are equal: the grader is not needed")

    @pytest.mark.parametrize(
        ("box", "answer"),
        [
            ("4", "4"),
            (" 4. ", "4"),
            ("\\dfrac{1}{2}", "\\frac{1}{2}"),
            ("$x = 1$", "x=1"),
            ("\\left(1, 2\\right)", "(1,2)"),
        ],
    )
    def test_equal_texts_need_no_grader(self, file, box, answer):
        source = write(file, [row(solution=f"First \\boxed{{9}}, then \\boxed{{{box}}}.", answer=answer)])
        assert len(load(source, grade=self.never)) == 1

    def test_no_box_no_check(self, file):
        assert len(load(write(file, [row(solution="It is four.", answer="4")]), grade=self.never)) == 1

    def test_the_grader_decides(self, file):
        asked = []

        def grade(text, *, answer):
            asked.append((text, answer))
            return Verdict("right" if answer == "0.5" else "wrong")

        solution = "It is \\boxed{\\frac12}."
        rows = [row(1, solution=solution, answer="0.5"), row(2, solution=solution, answer="3")]
        message = r"train\.jsonl:2: answer '3' differs from the solution's last box '\\\\frac12'"
        with pytest.raises(UserError, match=message):
            load(write(file, rows), grade=grade)
        assert asked == [(solution, "0.5"), (solution, "3")]

    def test_one_call_grades_all_rows_that_texts_do_not_decide(self, file):
        """The pool is asked once. Notes and bad rows keep the order of the rows, and a bad row does not use its id."""
        rows = [
            row(1, answer="2.0"),
            row(2, answer="5"),
            row(3),
            row(2),
            row(4, answer=""),
            row(5, solution="It is ten."),
            row(6, answer="x"),
        ]
        calls = []

        def grade(pairs):
            calls.append(pairs)
            return [Verdict({"2.0": "right", "5": "wrong", "x": "timeout"}[answer]) for _, answer in pairs]

        settings = DataSettings(train=write(file, rows), problems_per_step=1, on_bad_row="skip")
        problems = load_problems(settings, grade=grade)
        solutions = {number: f"It is \\boxed{{{2 * number}}}." for number in (1, 2, 6)}
        assert calls == [[(solutions[1], "2.0"), (solutions[2], "5"), (solutions[6], "x")]]
        assert [problem.id for problem in problems.problems] == ["p1", "p3", "p2", "p5", "p6"]
        assert problems.bad_rows == (
            f"{file}:2: answer '5' differs from the solution's last box '4'",
            f"{file}:5: column 'answer' is empty",
        )
        assert problems.notes[0] == (
            f"{file}:7: the grader ran out of time comparing answer 'x' with box '12'; the row is kept"
        )

    def test_a_missing_verdict_is_no_bad_row(self, file):
        problems = load(write(file, [row(answer="3")]), grade=lambda text, answer: Verdict("timeout"))
        assert len(problems) == 1
        assert "ran out of time" in problems.notes[0]

    def test_a_box_in_a_thought_that_never_ends_is_not_compared(self, file):
        source = write(file, [row(solution="<think>It is \\boxed{3}, or", answer="4")])
        assert len(load(source, grade=real_grade)) == 1
        with pytest.raises(UserError, match="answer '4' differs from the solution's last box '3'"):
            load(source, grade=partial(real_grade, rules=Rules(box_in_thought="count")))

    def test_can_be_turned_off(self, file):
        assert len(load(write(file, [row(answer="3")]), grade=self.never, check_answers=False)) == 1

    def test_without_a_grader_there_is_no_note(self, file):
        assert load(write(file, [row(answer="3")])).notes == ()


class TestHeldOut:
    def held_out(self, source, **options):
        return load_held_out(EvaluationSettings(problems=None if source is None else str(source), **options))

    def test_solutions_may_be_absent(self, file):
        source = write(file, [row(1, solution=...), row(2), row(3, solution="")])
        assert [problem.solution for problem in self.held_out(source).problems] == ["", "It is \\boxed{4}.", ""]

    def test_limit_takes_the_first(self, file):
        source = write(file, [row(1), row(2), row(3, answer="")])
        assert [problem.id for problem in self.held_out(source, limit=2).problems] == ["p1", "p2"]

    def test_bad_rows_are_errors(self, file):
        with pytest.raises(UserError, match=r"train\.jsonl:1: column 'answer' is empty; correct the row$"):
            self.held_out(write(file, [row(1, answer="")]))
        with pytest.raises(UserError, match=r"evaluation\.columns\.answer: no row"):
            self.held_out(write(file, [row(1, answer=...)]))

    def test_nothing_set(self):
        with pytest.raises(UserError, match=r"evaluation\.problems is null"):
            self.held_out(None)
