"""Runs over several domains: a user's function as GRPO's reward, anchors of code, accuracy by domain."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from megatron_paint.evaluation.summary import read_reports
from megatron_paint.launch.failure_notes import NOTES_FOLDER
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.objectives.grpo import advantages
from megatron_paint.training.inputs import load_inputs, save_checked_problems
from tests.support import tiny

ROOT = Path(__file__).parents[2]
FUNCTION = '''
def value(response):
    return sum(map(ord, response)) % 11

def score(response, answer, problem):
    """A score that a random model's responses differ in; it fails on three responses of eleven."""
    assert problem["answer"] == answer
    if value(response) in (6, 7, 8):
        raise ValueError("no verdict")
    return min(value(response) / 10, 1.0)

def always(response, answer, problem):
    return True
'''
PROGRAM = """We sort.
```python
def smallest{0}(items):
    ordered{0} = sorted(items, reverse=True)
    return ordered{0}[-1] + {1}
```
It is \\boxed{{smallest{0}}}."""


def rows():
    """Four problems of mathematics and four of code, whose solutions are programs."""
    found = []
    for number in range(4):
        found.append(
            {
                "id": f"m{number}",
                "problem": f"What is {number + 3} + {number + 5}?",
                "solution": f"We add {number + 3} and 40, minus 3{number}. So it is \\boxed{{{2 * number + 8}}}.",
                "answer": str(2 * number + 8),
            }
        )
        solution = PROGRAM.format(number, 70 + number)
        found.append(
            {
                "id": f"c{number}",
                "problem": "Write a program.",
                "solution": solution,
                "answer": "# tests ####",
                "kind": "code",
            }
        )
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model, tmp_path):
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "my_rewards.py").write_text(FUNCTION)
    path = tiny.make_settings(tmp_path, model, tmp_path / "problems.jsonl")
    with path.open("a") as file:
        file.write("domains: {code: {anchors: code, grader: 'my_rewards:score'}}\n")
    return path


DOMAIN = ("data.columns.domain=kind", "evaluation.columns.domain=kind", "run.save_every=0", "evaluation.limit=8")


def train(folder, settings, *overrides):
    command = [sys.executable, "-m", "megatron_paint", "train", str(settings), *DOMAIN, *overrides, "--processes", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout + done.stderr


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_grpo_with_a_function_of_the_user(settings, tmp_path):
    """Rewards, errors and advantages of each step are those that the function returns for the recorded responses."""
    namespace = {}
    exec(FUNCTION, namespace)
    printed = train(
        tmp_path,
        settings,
        *("objective.name=grpo", "objective.grpo.samples_per_problem=4", "run.steps=2", "data.problems_per_step=4"),
    )
    errors = 0
    for step, metrics in enumerate(lines(tmp_path / "run" / "metrics.jsonl"), start=1):
        samples = lines(tmp_path / "run" / "samples" / f"step_{step:06d}.jsonl")
        assert [sample["domain"] for sample in samples] == [
            "code" if sample["id"].startswith("c") else "math" for sample in samples
        ]
        values = [namespace["value"](sample["response_text"]) for sample in samples]
        failed = [
            value in (6, 7, 8) and sample["domain"] == "code" for value, sample in zip(values, samples, strict=True)
        ]
        rewards = [
            0.0 if sample["domain"] == "math" or value in (6, 7, 8) else value / 10
            for value, sample in zip(values, samples, strict=True)
        ]
        assert metrics["reward/mean"] == pytest.approx(statistics.fmean(rewards))
        assert metrics["reward/errors"] == sum(failed)
        expected = [a for start in range(0, 16, 4) for a in advantages(rewards[start : start + 4])]
        assert [sample["reward"] for sample in samples] == pytest.approx(rewards)
        assert [sample["advantage"] for sample in samples] == pytest.approx(expected)
        assert metrics["loss_tokens"] > 0
        errors += sum(failed)
    assert errors > 0
    assert "responses have no verdict and count as 0, because their grader failed" in printed
    assert "ValueError: no verdict" in printed
    report = json.loads((tmp_path / "run" / "eval" / "step_000002.json").read_text())
    own = [answer for answer in report["answers"] if answer["domain"] == "code"]
    assert len(own) == 4 * 3  # two samples and a greedy answer to each
    for answer in own:
        value = namespace["value"](answer["response_text"])
        assert answer["score"] == (None if value in (6, 7, 8) else value / 10)
        assert answer["outcome"] == ("error" if value in (6, 7, 8) else "right" if value == 10 else "wrong")
    assert report["metrics"]["domain/code/problems"] == report["metrics"]["domain/math/problems"] == 4
    assert f"code {100 * report['metrics']['domain/code/avg']:.1f} %" in printed


def test_paint_with_anchors_of_code(settings, tmp_path):
    train(tmp_path, settings, "run.steps=1", "data.problems_per_step=8", "evaluation.problems=null")
    samples = {sample["id"]: sample for sample in lines(tmp_path / "run" / "samples" / "step_000001.jsonl")}
    assert len(samples) == 8
    for number in range(4):
        assert [(anchor["kind"], anchor["text"]) for anchor in samples[f"c{number}"]["anchors"]] == [
            ("boxed", f"smallest{number}"),
            ("return", f"return ordered{number}[-1]+{70 + number}"),
            ("call", "sorted()"),
            ("literal", str(70 + number)),
            ("name", "items"),
            ("name", f"ordered{number}"),
            ("name", "reverse"),
        ]
        kinds = {anchor["kind"] for anchor in samples[f"m{number}"]["anchors"]}
        assert kinds == {"boxed", "number"}
        reveal = samples[f"c{number}"]["reveal"]
        assert reveal["reference_text"].startswith(reveal["shown_text"])


@pytest.mark.long
def test_the_extractor_of_a_run_is_that_of_all_domains_without_their_own(settings, tmp_path):
    train(
        tmp_path,
        settings,
        *("run.steps=1", "data.problems_per_step=8", "evaluation.problems=null", "objective.reveal.anchors=text"),
        "domains.code.anchors=null",
    )
    samples = lines(tmp_path / "run" / "samples" / "step_000001.jsonl")
    kinds = {sample["id"][0]: {anchor["kind"] for anchor in sample["anchors"]} for sample in samples}
    assert kinds == {"m": {"boxed", "quantity"}, "c": {"boxed", "quantity", "name"}}  # True begins with a capital


def test_rank_zero_gets_domains_and_choices_from_the_launcher(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiz = {"id": "q", "problem": "Which?", "solution": "Red.", "answer": "A", "kind": "quiz", "list": ["red", "blue"]}
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write(json.dumps(quiz) + "\n")
    overrides = ("data.columns.choices=list", "evaluation.columns.choices=list", "domains.quiz.grader=choice")
    loaded = load_settings(settings, [*DOMAIN, *overrides, "evaluation.limit=9"])
    shape = read_shape(loaded.model.hf_path)
    inputs = load_inputs(loaded, shape)
    assert [problem.domain for problem in inputs.held_out] == ["math", "code"] * 4 + ["quiz"]
    save_checked_problems(inputs, tmp_path)
    monkeypatch.setenv(NOTES_FOLDER, str(tmp_path))
    (tmp_path / "problems.jsonl").unlink()
    again = load_inputs(loaded, shape)
    assert (again.problems, again.held_out) == (inputs.problems, inputs.held_out)
    assert again.problems.problems[-1].choices == ("red", "blue")


class TestMistakes:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                ["domains.code.grader=my_reward:score", "objective.name=grpo"],
                r"domains.code.grader=my_reward:score cannot be used: it cannot be imported from",
            ),
            (["domains.code.grader=my_rewards:value"], "its arguments do not fit"),
            (["domains.code.anchors=python"], "domains.code.anchors: no anchor extractor has the name 'python'"),
            (
                ["objective.reveal.anchors=python"],
                "objective.reveal.anchors: no anchor extractor has the name 'python'",
            ),
            (["data.columns.domain=subject"], "data.columns.domain: no row of"),
            (["domains=null", "domains={}"], "names the domain 'code'; the domains are math"),
        ],
    )
    def test_one_line_before_training(self, settings, tmp_path, monkeypatch, capsys, overrides, message):
        monkeypatch.chdir(tmp_path)
        arguments = ["train", str(settings), *DOMAIN, *overrides, "--processes", "1", "--dry-run"]
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.strip().count("\n") == 0

    def test_a_function_that_nothing_uses_is_not_called(self, settings, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        overrides = ["domains.code.grader=nowhere:at_all", "evaluation.problems=null"]
        assert main(["train", str(settings), *DOMAIN, *overrides, "--processes", "1", "--dry-run"]) == 0


def test_recorded_responses_are_graded_by_domain(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(FUNCTION)
    problems = [
        {"id": "a", "problem": "p", "answer": "1/2"},
        {"id": "b", "problem": "p", "answer": "abba", "kind": "words"},
        {"id": "c", "problem": "p", "answer": "B", "kind": "quiz", "options": ["red", "blue"]},
        {"id": "d", "problem": "p", "answer": "x", "kind": "own"},
        {"id": "e", "problem": "p", "answer": "17", "kind": "found"},
    ]
    responses = {"a": r"\boxed{0.5}", "b": "Answer: ABBA", "c": r"\boxed{Blue}", "d": "anything", "e": "n=3, n=17"}
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (tmp_path / "responses.jsonl").write_text(
        "".join(json.dumps({"id": id, "response": text}) + "\n" for id, text in responses.items())
    )
    overrides = [
        *("evaluation.columns.domain=kind", "evaluation.columns.choices=options", "evaluation.grading_seconds=60"),
        *("domains.words.grader=exact", "domains.words.ignore_case=true", "domains.quiz.grader=choice"),
        *("domains.own.grader=my_rewards:always", "domains.found.grader=regex", "domains.found.pattern=n=([0-9]+)"),
    ]
    files = ["--responses", "responses.jsonl", "--benchmarks", "mixed.jsonl", "--out", "out"]
    assert main(["evaluate", *files, *overrides]) == 0
    (report,) = read_reports(tmp_path / "out")
    assert report.metrics["avg"] == 1
    assert {answer.problem_id: (answer.domain, answer.extracted) for answer in report.answers} == {
        "a": ("math", "0.5"),
        "b": ("words", "ABBA"),
        "c": ("quiz", "Blue"),
        "d": ("own", None),
        "e": ("found", "17"),
    }
    assert "mixed by domain: math 100.0 %, words 100.0 %, quiz 100.0 %, own 100.0 %" in capsys.readouterr().out
    assert "| mixed | quiz | 1 | 100.0 |" in (tmp_path / "out" / "summary.md").read_text()
