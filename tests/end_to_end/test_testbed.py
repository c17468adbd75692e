"""The testbed in small: two methods, one seed, on the quickstart's model, through its own command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.mark.long
def test_paint_and_opsd_on_one_model(tmp_path):
    """Both accuracies rise; the command resumes where it was ended, and writes its report."""
    model = tmp_path / "models" / "own-1"
    model.mkdir(parents=True)
    shutil.copytree(QUICKSTART / "model", model / "model")
    shutil.copy(QUICKSTART / "train.jsonl", model)
    held_out = (QUICKSTART / "held_out.jsonl").read_text().splitlines(keepends=True)
    for name in ("validation", "test"):
        (model / f"{name}.jsonl").write_text("".join(held_out[:120]))
    rates = {"chosen": {"opsd": 1e-3, "paint": 1e-3}}
    (tmp_path / "learning_rates.json").write_text(json.dumps(rates))
    command = [sys.executable, ROOT / "tools" / "testbed.py", "--out", tmp_path, "--variants", "own", "--warm-ups", "1"]
    command += ["--seeds", "1", "--methods", "opsd,paint"]
    for expected in (2, 0):  # runs that are done are not done again
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count(" %\n") == expected
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]["own"]
    assert set(runs) == {"opsd", "paint"}
    for (run,) in runs.values():
        assert run["steps"] == [0, 20, 40, 60]
        assert run["accuracy"][-1] > run["accuracy"][0] + 15
        assert run["greedy"] > 80
        assert run["tokens"][-1] > 30_000
    assert (tmp_path / "report.png").exists()
    assert "| paint | 1 |" in (tmp_path / "report.md").read_text()
