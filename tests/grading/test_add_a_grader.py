"""docs/add_a_grader.md, carried out: its function, its row and its settings, before the start and on responses."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.data.problems import load_problems
from megatron_paint.grading.graders import Graders
from megatron_paint.masker.overlap import measure_overlap

PAGE = (Path(__file__).parents[2] / "docs" / "add_a_grader.md").read_text(encoding="utf-8")


def block(language):
    (found,) = re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_grader.py").write_text(block("python"))
    (tmp_path / "problems.jsonl").write_text(block("json"))
    tree = YAML(typ="safe", pure=True).load(block("yaml"))
    tree["data"]["problems_per_step"] = 1
    return settings_of({"model": {"hf_path": "m"}, "run": {"dir": "r"}, **tree})


def test_the_function_has_ten_lines():
    assert len([line for line in block("python").splitlines() if line]) <= 10


def test_the_page_works(settings):
    (problem,) = load_problems(settings.data, domains=settings.domains).problems
    responses = [
        problem.solution,
        "I add:\n```python\ndef double(x):\n    return x + x\n```",
        "```python\ndef double(x):\n    return x * x\n```",
        "double(x) = 2 * x",
        "```python\nimport sys\nsys.exit(0)\n```",
        "```python\nimport os\nos._exit(0)\n```",
        "```python\nwhile True:\n    pass\n```",
    ]
    with Graders(settings.domains, workers=1, seconds=5.0) as graders:
        graders.check([problem])
        outcomes = [grade.outcome for grade in graders.grade([(text, problem) for text in responses])]
    assert outcomes == ["right", "right", "wrong", "wrong", "wrong", "wrong", "timeout"]
    anchors = settings.domains["code"].anchors
    measured = measure_overlap(problem="", solution=problem.solution, rollout=responses[1], anchors=anchors)
    assert [(anchor.text, anchor.found) for anchor in measured.anchors] == [("return 2*x", False), ("double", True)]


def test_a_program_sees_no_variable_of_the_run_and_an_empty_folder(settings, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_THE_RUN", "x")
    (problem,) = load_problems(settings.data, domains=settings.domains).problems
    looks = "import os\ndef double(x):\n    return 0 if 'TOKEN_OF_THE_RUN' in os.environ or os.listdir() else 2 * x"
    with Graders(settings.domains, workers=1) as graders:
        assert [grade.outcome for grade in graders.grade([(f"```python\n{looks}\n```", problem)])] == ["right"]


def test_without_the_file_the_start_names_the_setting(settings, tmp_path):
    (problem,) = load_problems(settings.data, domains=settings.domains).problems
    (tmp_path / "my_grader.py").unlink()
    message = r"^domains\.code\.grader=my_grader:passes cannot be used: .*No module named 'my_grader'"
    with Graders(settings.domains, workers=1) as graders, pytest.raises(UserError, match=message):
        graders.check([problem])
