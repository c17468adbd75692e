"""Rows that cannot be used for a reason outside their columns: prompts too long, and what an objective refuses."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import DataSettings
from megatron_paint.data.problems import PromptLimit, load_problems


def row(number=1, solution="It is 2."):
    return {"id": f"p{number}", "problem": f"Problem {number}?", "solution": solution, "answer": "2"}


def write(path, rows):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return str(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "train.jsonl"


def load(source, prompt_limit=None, mistake=None, **options):
    settings = DataSettings(train=source, problems_per_step=1, **options)
    return load_problems(settings, prompt_limit=prompt_limit, mistake=mistake)


class TestPromptLimit:
    @staticmethod
    def limit(length=lambda problem: len(problem.solution), **options):
        options = {"positions": 4000, "response": 1000, "setting": "rollout.max_new_tokens"} | options
        return PromptLimit(length=length, **options)

    def test_the_longest_prompt_just_fits(self, file):
        source = write(file, [row(1), row(2, solution="x" * 3000)])
        assert len(load(source, prompt_limit=self.limit())) == 2

    def test_a_response_too_long_is_the_fault_of_the_setting(self, file):
        """Row 2 misses by a token and row 4 by 500, so 500 is the largest value that fits all rows."""
        solutions = ["x", "x" * 3001, "x" * 3000, "x" * 3500]
        source = write(file, [row(number, solution=text) for number, text in enumerate(solutions, start=1)])
        with pytest.raises(UserError) as refused:
            load(source, prompt_limit=self.limit())
        assert str(refused.value) == (
            f"rollout.max_new_tokens=1000 is too large: the longest prompt of {source} has 3500 tokens ({source}:4), "
            "and the model has 4000 positions; set rollout.max_new_tokens to at most 500, or leave out the 2 of 4 rows "
            "with such prompts by data.on_bad_row=skip"
        )
        assert len(load(source, prompt_limit=self.limit(response=500))) == 4
        with pytest.raises(UserError, match=r"rollout\.max_new_tokens=501 is too large.* at most 500, or leave"):
            load(source, prompt_limit=self.limit(response=501))

    def test_rows_that_are_too_long_can_be_skipped(self, file):
        source = write(file, [row(1), row(2, solution="x" * 3001)])
        problems = load(source, prompt_limit=self.limit(), on_bad_row="skip")
        assert [problem.id for problem in problems.problems] == ["p1"]
        assert problems.bad_rows == (
            f"{source}:2: its longest prompt has 3001 tokens; at most 3000 fit beside rollout.max_new_tokens=1000",
        )

    def test_no_row_left_is_the_fault_of_the_setting(self, file):
        source = write(file, [row(1, solution="x" * 3002), row(2, solution="x" * 3001)])
        with pytest.raises(UserError, match=r"set rollout\.max_new_tokens to at most 998$"):
            load(source, prompt_limit=self.limit(), on_bad_row="skip")

    def test_a_prompt_longer_than_the_model_is_the_fault_of_the_row(self, file):
        source = write(file, [row(1), row(2, solution="x" * 4000)])
        message = r"train\.jsonl:2: its longest prompt has 4000 tokens, and the model has 4000 positions"
        with pytest.raises(UserError, match=message):
            load(source, prompt_limit=self.limit())

    def test_a_solution_that_is_trained_on_has_no_response_after_it(self, file):
        source = write(file, [row(1, solution="x" * 4000), row(2, solution="x" * 4001)])
        message = r"train\.jsonl:2: its prompt and solution have 4001 tokens, and the model has 4000 positions"
        with pytest.raises(UserError, match=message):
            load(source, prompt_limit=self.limit(response=0, setting=""))

    def test_a_limit_of_the_settings(self, file):
        source = write(file, [row(1), row(2, solution="x" * 3500), row(3, solution="x" * 4000)])
        limit = self.limit(positions=1_000_000, max_tokens=4000)
        with pytest.raises(
            UserError,
            match=r"3500 tokens .*:2\), and data\.max_tokens is 4000; set rollout\."
            r"max_new_tokens to at most 500, or data\.max_tokens to at least 4500, or leave out the 1 of 3 rows",
        ):
            load(write(file, [row(1), row(2, solution="x" * 3500), row(3)]), prompt_limit=limit)
        source = write(file, [row(1), row(2, solution="x" * 3500), row(3, solution="x" * 4000)])
        problems = load(source, prompt_limit=limit, on_bad_row="skip")
        assert [problem.id for problem in problems.problems] == ["p1"]
        assert f"{source}:3: its longest prompt has 4000 tokens, and data.max_tokens is 4000" in problems.bad_rows

    def test_a_limit_that_cannot_be_raised(self, file):
        source = write(file, [row(1), row(2, solution="x" * 3500)])
        with pytest.raises(UserError, match=r"max_new_tokens to at most 500, or leave out the 1 of 2 rows"):
            load(source, prompt_limit=self.limit(positions=4400, max_tokens=4000))

    def test_short_texts_are_not_counted(self, file):
        def length(problem):
            raise AssertionError("4 bytes cannot make 3000 tokens")

        assert len(load(write(file, [row()]), prompt_limit=self.limit(length))) == 1


class TestMistake:
    def test_names_the_row(self, file):
        source = write(file, [row(1), row(2)])
        found = {"p2": "it is odd"}
        with pytest.raises(
            UserError, match=r"train\.jsonl:2: it is odd; correct the row, or set data\.on_bad_row: skip"
        ):
            load(source, mistake=lambda problem: found.get(problem.id))
        assert len(load(source, mistake=lambda problem: found.get(problem.id), on_bad_row="skip")) == 1
