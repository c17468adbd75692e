"""docs/add_an_objective.md, carried out: its blocks are applied to a copy of the package, which then trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import make_model, make_problems, make_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_an_objective.md").read_text()
NEW_FILES = re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
DIFFS = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def changed_file(diff: str) -> str:
    (path,) = re.findall(r"^\+\+\+ b/(\S+)$", diff, re.MULTILINE)
    return path


def apply(diff: str, root: Path) -> None:
    """Replaces what each hunk of a diff shows; the old lines of a hunk must occur once in the file."""
    file = root / changed_file(diff)
    text = file.read_text()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(old) == 1, f"{file.name} does not hold once:\n{old}"
        text = text.replace(old, new)
    file.write_text(text)


def test_an_objective_touches_three_files_and_a_metric_two():
    files = [path for path, _ in NEW_FILES] + [changed_file(diff) for diff in DIFFS]
    metric = ["megatron_paint/objectives/best_of.py", "megatron_paint/objectives/metric_table.py"]
    assert [path for path in files if path != metric[1]] == [
        "megatron_paint/objectives/best_of.py",
        "megatron_paint/config/objective.py",
        "megatron_paint/objectives/__init__.py",
    ]
    assert metric[1] in files
    assert sum(len(text.splitlines()) for _, text in NEW_FILES) < 80


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the package with the page's changes."""
    root = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "megatron_paint", root / "megatron_paint", ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in NEW_FILES:
        (root / path).write_text(text)
    for diff in DIFFS:
        apply(diff, root)
    return root


def test_the_objective_trains(changed, tmp_path):
    """The model answers nothing right, so every second verdict is made right."""
    settings = make_settings(tmp_path, make_model(tmp_path / "model"), make_problems(tmp_path / "problems.jsonl"))
    code = (
        "import sys\n"
        "from megatron_paint.grading.grade import Grade, GradingPool\n"
        "def every_second(self, pairs):\n"
        "    return [Grade(correct=not i % 2, extracted='', outcome='right') for i, _ in enumerate(pairs)]\n"
        "GradingPool.grade = every_second\n"
        "from megatron_paint.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    overrides = ["objective.name=best_of", "run.steps=2", "run.save_every=0", "run.evaluate_every=0"]
    done = subprocess.run(
        [sys.executable, "-c", code, "train", settings, *overrides, "evaluation.problems=null", "--processes", "1"],
        cwd=changed,
        env=os.environ | {"PYTHONPATH": str(changed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["best_of/right_share"] == second["best_of/right_share"] == 0.5
    assert first["loss"] > 0
    assert first["grad_norm"] > 0
    assert "time/grade_s" in first
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert len(lines) == 8  # half of four responses to each of four problems


def test_its_name_and_its_metric_are_known(changed):
    code = (
        "from megatron_paint.config.settings import ObjectiveSettings\n"
        "from megatron_paint.objectives.metric_table import METRICS\n"
        "needs = ObjectiveSettings(name='best_of').needs\n"
        "assert (needs.samples_per_problem, needs.graders, needs.teacher) == (4, True, False)\n"
        "assert 'best_of/right_share' in METRICS\n"
    )
    environment = os.environ | {"PYTHONPATH": str(changed)}
    subprocess.run([sys.executable, "-c", code], cwd=changed, env=environment, check=True, timeout=120)
