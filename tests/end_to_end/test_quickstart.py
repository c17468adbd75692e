"""The quickstart as a user runs it: the model gets better at held-out problems, and not from the format alone.

`make test` trains fewer steps in one process. The command of `make quickstart`, 50 steps in four processes, and its
control are long.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
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
SMALL = (
    "megatron.tensor_model_parallel_size=1",
    "megatron.pipeline_model_parallel_size=1",
    "megatron.sequence_parallel=false",
    "run.steps=15",
)


@dataclass(frozen=True)
class Quickstart:
    """The quickstart's run, and how its commands are given."""

    small: bool
    run: Path

    def command(self, action: str, *arguments: str) -> None:
        """Runs a command with the quickstart's settings, to its end."""
        if self.small:
            ended = forked_ranks.run(
                self.run.parent, action, SETTINGS, *SMALL, *arguments, "--quiet", processes=1, limit=800
            )
            assert ended.statuses == [0], ended
            return
        done = subprocess.run(
            [sys.executable, "-m", "megatron_paint", action, SETTINGS, *arguments, "--processes", "4", "--quiet"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stderr[-3000:]


def reports(run_dir):
    folder = RunFolder(run_dir)
    first, *_, last = folder.evaluated_steps()
    return folder.read_eval(first), folder.read_eval(last)


COMPLETE = pytest.param(False, id="complete", marks=pytest.mark.long)


@pytest.fixture(scope="module", params=[pytest.param(True, id="small"), COMPLETE])
def quickstart(request, tmp_path_factory):
    """The quickstart, trained."""
    quickstart = Quickstart(request.param, tmp_path_factory.mktemp("quickstart") / "run")
    quickstart.command("train", f"run.dir={quickstart.run}")
    return quickstart


def greedy_alone(report):
    """The report's greedy answers as a report of one sample a problem."""
    answers = [replace(answer, sample_index=0) for answer in report.answers if answer.sample_index == -1]
    return replace(report, answers=tuple(answers), samples_per_problem=1)


def test_accuracy_rises(quickstart):
    before, after = reports(quickstart.run)
    assert before.num_problems >= 200
    assert 0.3 <= before.metrics["avg"] <= 0.6
    difference = paired_difference(before=before, after=after)
    assert difference.mean >= POINTS
    assert difference.low > 0
    greedy = paired_difference(before=greedy_alone(before), after=greedy_alone(after))
    assert greedy.mean >= POINTS
    assert greedy.low > 0


def test_transformers_gives_the_same_greedy_answers(quickstart):
    _, after = reports(quickstart.run)
    greedy = {answer.problem_id: answer.response_text for answer in after.answers if answer.sample_index == -1}
    (out,) = (quickstart.run / "hf").iterdir()
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    template = (ROOT / "examples/quickstart/templates/evaluation.jinja").read_text()
    batches = defaultdict(dict)  # prompts of one length need no padding
    for line in (ROOT / "examples/quickstart/held_out.jsonl").read_text().splitlines():
        problem = json.loads(line)
        content = template.replace("{{ problem }}", problem["problem"]).rstrip("\n")
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(chat, add_special_tokens=False).input_ids
        batches[len(ids)][problem["id"]] = ids
    answers = {}
    for length, prompts in batches.items():
        with torch.no_grad():
            generated = model.generate(torch.tensor(list(prompts.values())), max_new_tokens=40, do_sample=False)
        texts = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
        answers |= dict(zip(prompts, texts, strict=True))
    assert len(answers) == 240
    assert answers == greedy


def test_no_training_changes_nothing(quickstart, tmp_path):
    """The untrained model, sampled once more with another key: the interval of the difference holds 0."""
    quickstart.command("evaluate", "run.seed=2", "--out", str(tmp_path / "again"))
    (again,) = read_reports(tmp_path / "again")
    before, _ = reports(quickstart.run)
    difference = paired_difference(before=before, after=again)
    assert difference.low <= 0 <= difference.high
    assert again.metrics["greedy"] == before.metrics["greedy"]


@pytest.mark.parametrize("quickstart", [COMPLETE], indirect=True)
def test_shuffled_solutions_do_not_teach(quickstart, tmp_path):
    """Solutions of other problems have the format and not the content: they must not give the rise."""
    quickstart.command("train", f"run.dir={tmp_path / 'run'}", "objective.reveal.solution=wrong")
    before, after = reports(quickstart.run)
    _, control = reports(tmp_path / "run")
    rise = after.metrics["avg"] - before.metrics["avg"]
    assert control.metrics["avg"] - before.metrics["avg"] < rise / 2
    assert paired_difference(before=control, after=after).low > 0
