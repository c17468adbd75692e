"""Completion: what argcomplete prints for the words before the cursor, in the protocol that the shells use."""

import os
import subprocess
import sys

import pytest

from tests.support.finished import ROOT

pytest.importorskip("argcomplete")


def completions(line, tmp_path, shell="bash"):
    """What a shell is offered at the end of the line."""
    out = tmp_path / "completions"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": shell,
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    code = "import sys; sys.argv[0] = 'megatron-paint'; from megatron_paint.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [word.partition("\t")[0].strip() for word in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megatron-paint qui", ["quickstart"]),
        ("megatron-paint convert to-", ["to-megatron", "to-hf"]),
        ("megatron-paint train my.yaml --dry", ["--dry-run"]),
        ("megatron-paint init qwen3_1", ["qwen3_1p7b", "qwen3_14b"]),
        ("megatron-paint init qwen3_235b_a22b o", ["opsd"]),
        ("megatron-paint init nothing o", []),
        ("megatron-paint settings optimizer.cl", ["optimizer.clip_grad"]),
        ("megatron-paint train my.yaml optimizer.cl", ["optimizer.clip_grad="]),
    ],
)
def test_words(line, expected, tmp_path):
    assert completions(line, tmp_path) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell, tmp_path):
    found = completions("megatron-paint re", tmp_path, shell)
    assert [word.partition(":")[0] for word in found] == ["report"]
