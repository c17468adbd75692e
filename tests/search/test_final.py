"""The problems of a search, and the final comparison."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import load_settings
from megatron_paint.run.console import Progress
from megatron_paint.search import final
from megatron_paint.search.final import compare, load_problems
from megatron_paint.search.space import Space, read_space
from megatron_paint.search.study import TrialRecord
from megatron_paint.search.trial_run import Place
from tests.search.spaces import given, space, write_space


def test_problems_of_other_domains(tmp_path):
    """`evaluation.domain` and a column of domains name those of the section `domains`."""
    rows = [{"id": id, "solution": "abc", "answer": "abc"} for id in "ab"]
    rows[1]["kind"] = "strings"
    for name in ("validation", "test"):
        text = "\n".join(json.dumps(row | {"problem": f"Say abc in the {name}."}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = write_space(tmp_path, validation={"problems": f"{tmp_path}/validation.jsonl"})
    for override, domains in (
        ("evaluation.domain=strings", ["strings", "strings"]),
        ("evaluation.columns={domain: kind}", ["math", "strings"]),
    ):
        settings = given("domains={strings: {grader: exact}}", f"evaluation.problems={tmp_path}/test.jsonl", override)
        found = load_problems(read_space(path, settings))
        for benchmark in (found.validation, found.test):
            assert [problem.domain for problem in benchmark.problems] == domains


def compare_by(program: str, folder: Path, monkeypatch, one: Space) -> tuple[int, list[subprocess.Popen]]:
    """`compare` of trials 0 and 1, where a program takes the place of `evaluate`; its status, and the processes."""
    started = []

    def start(arguments, place, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as stream:
            command = [sys.executable, "-c", program, *arguments]
            started.append(subprocess.Popen(command, stdout=stream, stderr=stream, process_group=0))
        return started[-1]

    monkeypatch.setattr(final, "start_process", start)
    other = one.default | {"optimizer.lr": 5e-3}
    trials = [
        TrialRecord(number=number, state="complete", chosen=chosen, accuracies={4: accuracy})
        for number, (chosen, accuracy) in enumerate(((one.default, 0.1), (other, 0.2)))
    ]
    place, progress = Place(processes=1), Progress("quiet", steps=0)
    return compare(folder, one, trials, place=place, progress=progress), started


WRITES = "import pathlib, sys; out = pathlib.Path(sys.argv[6]); out.mkdir(); (out / 'summary.json').write_text('{}')"


def test_each_trial_is_evaluated_with_its_own_settings(tmp_path, monkeypatch):
    one = space(tmp_path)
    status, started = compare_by(WRITES, tmp_path, monkeypatch, one)
    assert (status, [process.returncode for process in started]) == (0, [0, 0])
    for number, rate in ((0, one.given.optimizer.lr), (1, 5e-3)):
        settings = load_settings(tmp_path / "final" / f"{number:04d}.yaml")
        assert settings.optimizer.lr == rate
        assert settings.evaluation == one.given.evaluation
    assert compare_by(WRITES, tmp_path, monkeypatch, one) == (0, [])  # it is done


def test_a_signal_stops_the_comparison(tmp_path, monkeypatch, capsys):
    program = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    status, (process,) = compare_by(program, tmp_path, monkeypatch, space(tmp_path))
    assert (status, process.returncode) == (75, -signal.SIGKILL)
    assert "SIGTERM: the final comparison stops" in capsys.readouterr().err
    assert not list(tmp_path.glob("claims/*"))


def test_an_evaluation_that_fails(tmp_path, monkeypatch):
    program = "import sys; sys.exit('megatron-paint: error: the disk is full')"
    with pytest.raises(UserError, match=r"evaluation of trial 0 ended with exit status 1: .*the disk is full"):
        compare_by(program, tmp_path, monkeypatch, space(tmp_path))
