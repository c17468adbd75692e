"""Inputs: how long answers may be, and what the user is told about turns, thoughts and thinking settings."""

import json
from types import SimpleNamespace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.main import main
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import forbidden_changes
from megatron_paint.config.settings import LONGEST_ANSWER, EvaluationSettings
from megatron_paint.config.tree import settings_tree
from megatron_paint.records import Problem
from megatron_paint.training.inputs import fit_answers, shorter_answers
from tests.support import tiny

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING_ONLY = PLAIN.replace("assistant\n{%", "assistant\n<think>\n{%")
OPENS = tiny.CHAT.replace("{% endif %}{% endif %}", "{% else %}<think>\n{% endif %}{% endif %}")
THOUGHT = "<think>\nAdding.\n</think>\n\n"


def problem_of(length, number=0):
    return Problem(id=f"p{number}", problem="x" * length, solution="", answer="1", source=f"file:{number + 1}")


# A prompt of one token for each letter.
PROMPTS = SimpleNamespace(evaluation_prompt=lambda problem, thinking: tuple(problem.problem))


def fitted(value, *lengths, positions=32_768):
    problems = [problem_of(length, number) for number, length in enumerate(lengths)]
    shape = SimpleNamespace(max_positions=positions)
    return fit_answers(EvaluationSettings(max_new_tokens=value), shape, PROMPTS, problems).max_new_tokens


class TestAnswers:
    @pytest.mark.parametrize(
        ("positions", "lengths", "most"),
        [
            (32_768, (100, 168, 20), 32_600),
            (40_960, (2048,), 38_912),  # Qwen3's positions and the longest prompt that OPSD's limit allows
            (40_960, (2049,), 38_911),
            (262_144, (5,), 38_912),
            (10, (9,), 1),
        ],
    )
    def test_default(self, positions, lengths, most):
        assert fitted(None, *lengths, positions=positions) == most

    @pytest.mark.parametrize("value", [1, 1000, 32_600])
    def test_a_value_that_fits_is_kept(self, value):
        assert fitted(value, 168, 20) == value

    def test_a_value_too_large(self):
        with pytest.raises(UserError) as refused:
            fitted(32_601, 20, 168, 168)
        assert str(refused.value) == (
            "evaluation.max_new_tokens=32601 is too large: the longest prompt of the evaluation has 168 tokens (file:2)"
            ", and the model has 32768 positions; set evaluation.max_new_tokens to at most 32600"
        )

    def test_a_prompt_that_no_value_fits(self):
        for value in (None, 5):
            with pytest.raises(
                UserError, match=r"^file:2: its prompt has 10 tokens, and the model has 10 positions; leave"
            ):
                fitted(value, 2, 10, positions=10)

    def test_the_user_is_told_of_a_shorter_default(self):
        shape = SimpleNamespace(max_positions=32_768)
        asked, found = EvaluationSettings(), EvaluationSettings(max_new_tokens=32_600)
        (note,) = shorter_answers(asked, found, shape)
        assert "at most 32,600 tokens in an evaluation and not 38,912, because the model's 32,768 positions" in note
        assert shorter_answers(asked, EvaluationSettings(max_new_tokens=LONGEST_ANSWER), shape) == ()
        assert shorter_answers(found, found, shape) == ()

    def test_a_run_of_the_number_that_was_the_default_resumes(self):
        """The number was accepted only where it fits, and there null means the same."""
        smallest = {"model": {"hf_path": "m"}, "data": {"train": "t"}, "run": {"dir": "r"}}
        trees = {
            value: settings_tree(settings_of(smallest | {"evaluation": {"max_new_tokens": value}}))
            for value in (None, LONGEST_ANSWER, 100)
        }
        assert forbidden_changes(old=trees[LONGEST_ANSWER], new=trees[None]) == []
        assert forbidden_changes(old=trees[None], new=trees[LONGEST_ANSWER]) == []
        assert forbidden_changes(old=trees[100], new=trees[None]) == ["evaluation.max_new_tokens: 100 -> None"]


@pytest.fixture
def made(tmp_path, capsys):
    """Dry-runs a tiny run with a chat template, solutions and overrides; returns what it prints."""
    tiny.make_model(tmp_path / "model")

    def dry_run(template, *overrides, solution=lambda row: row["solution"]):
        if template is not None:
            (tmp_path / "model" / "chat_template.jinja").write_text(template)
        problems = tiny.make_problems(tmp_path / "problems.jsonl")
        rows = [json.loads(line) for line in problems.read_text().splitlines()]
        problems.write_text("".join(json.dumps(row | {"solution": solution(row)}) + "\n" for row in rows))
        settings = tiny.make_settings(tmp_path, tmp_path / "model", problems)
        status = main(["train", str(settings), *overrides, "--processes", "1", "--dry-run"])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return dry_run


SFT, NO_EVALUATION = "objective={name: sft}", "evaluation.problems=null"


class TestThinkingSwitch:
    def test_no_note_where_it_works(self, made):
        status, said = made(None)
        assert status == 0
        assert "thinking switch" not in said

    def test_paint(self, made):
        status, said = made(PLAIN, "prompts.teacher_thinking=true")
        assert status == 0
        assert (
            "the chat template has no thinking switch, and every prompt ends without a thought: "
            "prompts.student_thinking=false, prompts.teacher_thinking=true, evaluation.thinking=false do nothing"
        ) in said

    @pytest.mark.parametrize(("solution", "named"), [("none", False), ("reference_free", True)])
    def test_a_teacher_with_the_student_s_prompt_has_its_thinking_mode(self, made, solution, named):
        _, said = made(PLAIN, f"objective.reveal.solution={solution}", NO_EVALUATION)
        assert "prompts.student_thinking=false" in said
        assert ("prompts.teacher_thinking=false" in said) == named

    def test_settings_that_a_run_does_not_use_are_not_named(self, made):
        _, said = made(THINKING_ONLY, "objective={name: grpo}", NO_EVALUATION)
        assert (
            "the chat template has no thinking switch, and every prompt ends in an open <think>: "
            "prompts.student_thinking=false does nothing"
        ) in said


class TestSolutions:
    @pytest.mark.parametrize(
        ("template", "overrides", "count", "warning"),
        [
            (
                OPENS,
                ("prompts.student_thinking=true",),
                5,
                "ends in an open <think>, and 3 of 8 solutions have no </think>",
            ),
            (OPENS, (), 0, None),
            (None, (), 8, "ends with a closed <think> block, and 8 of 8 solutions bring their own"),
            (None, (), 1, "ends with a closed <think> block, and 1 of 8 solutions brings its own"),
            (None, (), 0, None),
            (None, ("prompts.student_thinking=true",), 8, None),
            (None, ("prompts.student_thinking=true",), 0, None),
            (THINKING_ONLY, (), 8, None),
            (THINKING_ONLY, (), 6, "ends in an open <think>, and 2 of 8 solutions have no </think>"),
            (PLAIN, (), 8, None),
            (PLAIN, (), 0, None),
        ],
    )
    def test_sft(self, made, template, overrides, count, warning):
        def solution(row):
            return (THOUGHT if int(row["id"][1:]) < count else "") + row["solution"]

        status, said = made(template, SFT, NO_EVALUATION, *overrides, solution=solution)
        assert status == 0
        if warning is None:
            assert "warning" not in said
        else:
            assert f"warning: every prompt {warning}" in said
            assert ("set prompts.student_thinking=" in said) == (template in (None, OPENS))

    def test_a_tag_that_closes_nothing(self, made):
        status, said = made(PLAIN, SFT, NO_EVALUATION, solution=lambda row: "Adding.\n</think>\n\n" + row["solution"])
        assert status == 0
        assert "warning: 8 of 8 solutions contain </think> without <think> before it" in said

    def test_other_objectives_show_solutions_as_text(self, made):
        _, said = made(None, NO_EVALUATION, solution=lambda row: THOUGHT + row["solution"])
        assert "warning" not in said

    @pytest.mark.parametrize("template", [None, PLAIN, THINKING_ONLY])
    def test_a_turn_that_ends_inside_a_thought_is_refused(self, made, template):
        def solution(row):
            return f"<think>\n{row['solution']}" if row["id"] == "p2" else row["solution"]

        status, said = made(template, SFT, NO_EVALUATION, solution=solution)
        assert status == 2
        assert "problems.jsonl:3: the solution opens a thought (<think>) and does not close it" in said
        status, said = made(template, SFT, NO_EVALUATION, "data.on_bad_row=skip", solution=solution)
        assert status == 0
        assert "7 training problems" in said
