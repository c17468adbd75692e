"""The quickstart's task and its shipped files: the properties that its documentation promises."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from megatron_paint.config.load import load_settings
from megatron_paint.data.problems import load_held_out, load_problems
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.records import Problem

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
task = importlib.import_module("quickstart_task")
rows_of = importlib.import_module("warm_up_rows")
OWN = importlib.import_module("testbed_variants").VARIANTS["own"]
QUICKSTART = ROOT / "examples" / "quickstart"
SUM = task.RunningSum(start=47, operands=(8, -9))
SOLUTION = "47+8=55\n55-9=46\n\\boxed{46}"


@pytest.fixture(scope="module")
def settings():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield load_settings(QUICKSTART / "paint.yaml")


@pytest.fixture(scope="module")
def prompts(settings):
    return Prompts(settings.prompts, load_tokenizer(QUICKSTART / "model"))


def records(name):
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


def text(prompts, ids):
    return prompts.tokenizer.decode(ids, keep_special=True)


def test_a_solution_has_a_line_a_step_and_the_box():
    assert SUM.text == "47+8-9?"
    assert OWN.solve(SUM) == SOLUTION


@pytest.mark.parametrize(
    ("value", "operand", "right", "forgetful"), [(47, 8, 55, 45), (55, -9, 46, 56), (41, 5, 46, 46), (60, -1, 59, 69)]
)
def test_forgetting_leaves_the_tens_digit_where_a_step_crosses_a_ten(value, operand, right, forgetful):
    assert task.result(value, operand, forgets=False) == right
    assert task.result(value, operand, forgets=True) == forgetful


@pytest.mark.parametrize(("value", "operand", "after"), [(12, -5, 17), (95, 8, 93)])
def test_a_step_never_leaves_two_digits(value, operand, after):
    assert task.result(value, operand, forgets=False) == after


def test_a_mistake_is_carried_on():
    assert "".join(OWN.task.work_out(SUM, forgets=[True, False])) == "47+8=45\n45-9=36\n\\boxed{36}"


def test_drawn_problems_are_sound_and_on_their_side_of_the_split():
    rng = random.Random(3)
    for held_out in (True, False):
        for _ in range(200):
            drawn = OWN.task.draw(rng, held_out=held_out)
            problem = OWN.problem_of(drawn, id="x")
            assert drawn.is_held_out == held_out
            assert eval(problem.problem.removesuffix("?")) == int(problem.answer)
            assert problem.solution.endswith(f"\\boxed{{{problem.answer}}}")
            assert all(eval(line.replace("=", "==")) for line in problem.solution.splitlines()[:-1])


def test_the_problem_files_are_what_the_tool_writes(tmp_path):
    for name, held_out in (("train.jsonl", False), ("held_out.jsonl", True)):
        shipped = records(name)
        drawn = rows_of.draw_problems(len(shipped), held_out=held_out, seed=7, variant=OWN)
        rows_of.write_problems(tmp_path / name, drawn)
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


def test_no_held_out_problem_is_a_training_problem():
    train, held_out = ({row["problem"] for row in records(name)} for name in ("train.jsonl", "held_out.jsonl"))
    assert len(held_out) >= 200
    assert not train & held_out


def test_the_problem_files_load_with_every_answer_checked(settings, monkeypatch):
    monkeypatch.chdir(ROOT)
    from megatron_paint.grading.grade import GradingPool

    with GradingPool() as graders:
        assert len(load_problems(settings.data, grade=graders.grade)) == len(records("train.jsonl"))
    assert len(load_held_out(settings.evaluation).problems) == len(records("held_out.jsonl"))


def test_all_texts_of_the_task_survive_the_tokenizer(prompts):
    unknown = prompts.tokenizer.control_tokens["<unk>"]
    for row in records("held_out.jsonl"):
        for piece in (row["problem"], row["solution"], f"{row['problem']}\nReference:{row['solution'][:9]}..."):
            ids = prompts.tokenizer.encode(piece)
            assert unknown not in ids
            assert text(prompts, ids) == piece


def test_transformers_reads_the_same_tokenizer(prompts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    assert tuple(tokenizer.encode(SOLUTION, add_special_tokens=False)) == prompts.tokenizer.encode(SOLUTION)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": SUM.text}], add_generation_prompt=True)
    assert tuple(chat["input_ids"]) == prompts.student_prompt(OWN.problem_of(SUM, id="x"))


def test_prompts(prompts):
    problem = OWN.problem_of(SUM, id="x")
    rows = rows_of.RowMaker(prompts=prompts, rng=random.Random(0), variant=OWN)
    student = prompts.student_prompt(problem)
    assert text(prompts, student) == "<|im_start|>user47+8-9?<|im_end|><|im_start|>assistant"
    assert len(student) == 12
    assert prompts.evaluation_prompt(problem, False) == student
    complete = text(prompts, rows.reference_prompt(problem, SOLUTION, 1.0))
    assert complete == f"<|im_start|>user47+8-9?\nReference:{SOLUTION}<|im_end|><|im_start|>assistant"
    # 20 tokens, so 10 are kept: the first line, its end, and "55" of the second.
    cut = text(prompts, rows.reference_prompt(problem, SOLUTION, 0.5))
    assert cut == "<|im_start|>user47+8-9?\nReference:47+8=55\n55...<|im_end|><|im_start|>assistant"


def test_an_off_track_row_learns_only_what_follows_its_mistakes(prompts):
    shares = {"off_track_share": 1.0, "forget_share": 1.0, "whole_share": 1.0}
    rows = rows_of.RowMaker(prompts=prompts, rng=random.Random(5), variant=OWN, **shares)
    for _ in range(50):
        row = rows.reference()
        asked, given = text(prompts, row.student_prompt_ids).split("<|im_start|>assistant")
        learnt = text(prompts, row.response_ids).removesuffix("<|im_end|>")
        *lines, box = learnt.split("\n")
        assert given.endswith("\n")
        assert "Reference:" in asked
        start = int((given + learnt).split("\\boxed{")[0].rstrip("\n").split("=")[-1])
        assert box == f"\\boxed{{{start}}}"
        for line in lines:
            value, operand = int(line[:2]), int(line[2:4])
            assert line == f"{value}{operand:+d}={task.result(value, operand, forgets=False)}"


def test_the_shipped_model_splits_over_two_stages_and_four_shards():
    shape = read_shape(QUICKSTART / "model")
    assert shape.num_layers % 2 == 0
    assert shape.vocab_size % 4 == 0
    assert shape.num_parameters < 500_000
    assert sum(path.stat().st_size for path in (QUICKSTART / "model").iterdir()) <= 2_000_000


def test_the_tokenizer_fits_the_model_and_ends_responses_as_the_chat_does(prompts):
    assert prompts.tokenizer.size == len(task.VOCABULARY) <= rows_of.VOCABULARY_ROWS
    assert prompts.tokenizer.stop_ids[0] == task.VOCABULARY.index("<|im_end|>")
    assert (
        prompts.sft_response(Problem(id="x", problem="", solution="46", answer="46"))[-1]
        == prompts.tokenizer.stop_ids[0]
    )


def test_the_validation_problems_of_the_search_continue_the_held_out_ones():
    """One draw of 400 problems: the first 240 are the held-out problems, and the rest is in no other file."""
    drawn = rows_of.draw_problems(400, held_out=True, seed=7, variant=OWN)
    rows = records("held_out.jsonl") + records("../search/validation.jsonl")
    assert rows == [{key: getattr(one, key) for key in ("id", "problem", "solution", "answer")} for one in drawn]
    texts = [row["problem"] for row in (*rows, *records("train.jsonl"))]
    assert len(set(texts)) == len(texts) == 2400
