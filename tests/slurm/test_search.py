"""`megatron-paint launch search` on a real cluster: workers on two nodes share the trials of one study."""

import json
import re
import sys

import pytest

from megatron_paint.run.folder import RunFolder
from megatron_paint.search.trial_run import trial_folder
from tests.search.spaces import SETTINGS, write_space
from tests.search.stored import read_trials
from tests.slurm.job import Job
from tests.slurm.shipped import ENVIRONMENT, MINUTES, ROOT
from tests.support.until import until

TRIALS = 5
OPTIONS = ("--workers=2", "--attempts=2", "--gpus-per-node=0", "--cpus-per-task=96", "--mem=64G")  # complete nodes


@pytest.mark.long
def test_two_workers_of_which_one_is_stopped(cluster, tmp_path):
    """The signal before the time limit stops a worker's trial with a checkpoint, and its next job resumes it."""
    out = tmp_path / "out"
    space = write_space(tmp_path, budget={"steps": 6, "evaluate_every": 2}, pruner={"rule": "none"})
    command = [sys.executable, "-m", "megatron_paint", "launch", "search", SETTINGS, space, f"--out={out}"]
    command += ["--env=PYTHONPATH", "--env=OMP_NUM_THREADS", f"--trials={TRIALS}", *OPTIONS]
    command += ["data.problems_per_step=8", "evaluation.limit=12", "evaluation.samples=2"]
    done = cluster.run(command, cwd=ROOT, env=ENVIRONMENT, seconds=MINUTES)
    (submitted,) = re.findall(r"^submitted +(.*); console", done.stdout, re.MULTILINE)
    first, first_again, second, second_again = (Job(cluster, int(number)) for number in submitted.split(", "))

    def trains() -> list[int]:
        assert not first.has_ended(), first.describe()
        found = [int(number) for number in re.findall(r"^trial (\d+): ", first.output(), re.MULTILINE)]
        return [number for number in found if RunFolder(trial_folder(out, number)).read_metrics()]

    stopped = until(trains, seconds=MINUTES, otherwise=first.describe)[-1]
    first.signal("USR1")
    first.wait("COMPLETED", seconds=MINUTES)
    assert "search: stopped with checkpoints; the next job of this worker continues" in first.output()
    for job in (first_again, second):
        job.wait("COMPLETED", seconds=MINUTES)
        assert "search: nothing is left for this worker" in job.output()
    second_again.wait("CANCELLED")
    assert first.nodes() != second.nodes()
    trials = read_trials(out)
    assert [(trial.state, trial.reason) for trial in trials] == [("complete", "")] * TRIALS
    for trial in trials:
        steps = [line["step"] for line in RunFolder(trial_folder(out, trial.number)).read_metrics()]
        assert steps == list(range(1, 7)), trial
    printed = [first.output(), first_again.output(), second.output()]
    began = [int(number) for text in printed for number in re.findall(r"^trial (\d+): ", text, re.MULTILINE)]
    resumed = [int(number) for text in printed for number in re.findall(r"^trial (\d+), resumed", text, re.MULTILINE)]
    assert sorted(began) == list(range(TRIALS))  # none twice
    assert resumed == [stopped]
    assert len(json.loads((out / "report.json").read_text())["trials"]) == TRIALS
