"""The quickstart as a user runs it: the model gets better at held-out problems, and not from the format alone.

Its ranks are forked here. The control, which is `long`, starts them as a user does.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megatron_paint.evaluation.statistics import paired_difference
from megatron_paint.evaluation.summary import read_reports
from megatron_paint.run.folder import RunFolder
from tests.support import forked_ranks

ROOT = Path(__file__).parents[2]
SETTINGS = "examples/quickstart/paint.yaml"
POINTS = 0.10  # that accuracy must rise by


def command(folder, action, *arguments):
    """The quickstart's settings on four ranks, as its command line starts them."""
    ended = forked_ranks.run(folder, action, SETTINGS, *arguments, "--quiet", processes=4, limit=800)
    assert ended.statuses == [0] * 4, ended


def reports(run_dir):
    folder = RunFolder(run_dir)
    first, *_, last = folder.evaluated_steps()
    return folder.read_eval(first), folder.read_eval(last)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folder of the quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    command(folder, "train", f"run.dir={folder / 'run'}")
    return folder / "run"


def greedy_alone(report):
    """The report's greedy answers as a report of one sample a problem."""
    answers = [replace(answer, sample_index=0) for answer in report.answers if answer.sample_index == -1]
    return replace(report, answers=tuple(answers), samples_per_problem=1)


def test_accuracy_rises(trained):
    before, after = reports(trained)
    assert before.num_problems >= 200
    assert 0.3 <= before.metrics["avg"] <= 0.6
    difference = paired_difference(before=before, after=after)
    assert difference.mean >= POINTS
    assert difference.low > 0
    greedy = paired_difference(before=greedy_alone(before), after=greedy_alone(after))
    assert greedy.mean >= POINTS
    assert greedy.low > 0


def test_transformers_gives_the_same_greedy_answers(trained):
    _, after = reports(trained)
    greedy = {answer.problem_id: answer.response_text for answer in after.answers if answer.sample_index == -1}
    (out,) = (trained / "hf").iterdir()
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    template = (ROOT / "examples/quickstart/templates/evaluation.jinja").read_text()
    ids = {}
    for line in (ROOT / "examples/quickstart/held_out.jsonl").read_text().splitlines():
        problem = json.loads(line)
        content = template.replace("{{ problem }}", problem["problem"]).rstrip("\n")
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids[problem["id"]] = tokenizer(chat, add_special_tokens=False).input_ids
    assert ids.keys() == greedy.keys()
    for length in {len(prompt) for prompt in ids.values()}:  # a batch for each length, so that nothing is padded
        batch = {name: prompt for name, prompt in ids.items() if len(prompt) == length}
        with torch.no_grad():
            generated = model.generate(torch.tensor(list(batch.values())), max_new_tokens=40, do_sample=False)
        for name, row in zip(batch, generated, strict=True):
            assert tokenizer.decode(row[length:], skip_special_tokens=True) == greedy[name]


def test_no_training_changes_nothing(trained, tmp_path):
    """The untrained model, sampled once more with another key: the interval of the difference holds 0."""
    command(tmp_path, "evaluate", "run.seed=2", "--out", tmp_path / "again")
    (again,) = read_reports(tmp_path / "again")
    before, _ = reports(trained)
    difference = paired_difference(before=before, after=again)
    assert difference.low <= 0 <= difference.high
    assert again.metrics["greedy"] == before.metrics["greedy"]


@pytest.mark.long
def test_shuffled_solutions_do_not_teach(trained, tmp_path):
    """Solutions of other problems have the format and not the content: they must not give the rise."""
    arguments = (f"run.dir={tmp_path / 'run'}", "objective.reveal.solution=wrong", "--processes", "4", "--quiet")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_paint", "train", SETTINGS, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = reports(trained)
    _, control = reports(tmp_path / "run")
    rise = after.metrics["avg"] - before.metrics["avg"]
    assert control.metrics["avg"] - before.metrics["avg"] < rise / 2
    assert paired_difference(before=control, after=after).low > 0
