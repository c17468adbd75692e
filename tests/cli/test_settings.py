"""`megatron-paint settings`: all keys, a section, one key, a misspelt one; without torch."""

import json
import subprocess
import sys
from pathlib import Path

from megatron_paint.cli.main import main

ROOT = Path(__file__).parents[2]


def test_one_setting(capsys):
    assert main(["settings", "optimizer.lr"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "optimizer: The optimiser and the schedule of its learning rate.",
        "  optimizer.lr",
        "    peak learning rate",
        "    number: above 0",
        "    default: 5e-06 (OPSD, arXiv 2601.18734)",
    ]


def test_all_settings_and_their_json(capsys):
    assert main(["settings"]) == 0
    text = capsys.readouterr().out
    assert main(["settings", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = [line.strip() for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    assert keys == [setting["key"] for setting in found]
    assert {"model.lora", "objective.loss.clip", "run.steps", "evaluation.columns.id"} <= set(keys)
    clip = next(setting for setting in found if setting["key"] == "objective.loss.clip")
    assert (clip["type"], clip["allowed"], clip["default"], clip["needed"]) == (
        "number or null",
        "above 0",
        None,
        False,
    )


def test_a_misspelt_key_is_one_line(capsys):
    assert main(["settings", "run.stepps"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "megatron-paint: error: unknown setting run.stepps: did you mean run.steps?\n"


def test_it_needs_no_torch_and_survives_a_closed_pipe():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_paint.cli.main import main\n"
        "sys.exit(main(['settings']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 0
