"""The options of the evaluate command: which model and benchmarks they request, and what is missing."""

from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate import fingerprint
from megatron_paint.cli.evaluate_options import requested


def test_other_weights_in_the_same_place_are_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("any")
    assert fingerprint(tmp_path) == before
    for place in (0, 150_000, 299_999):
        content = bytearray(300_000)
        content[place] = 1
        file.write_bytes(content)
        assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --model FOLDER, or a settings file"),
        ({"model": Path("nowhere")}, "nowhere is neither a Hugging Face folder"),
        ({"model": "hf"}, "give --benchmarks"),
        ({"model": "hf", "benchmarks": "a.jsonl", "samples": 0}, "evaluation.samples"),
        ({"model": "bare", "benchmarks": "a.jsonl"}, "model.hf_path is not set"),
        ({"model": "broken", "benchmarks": "a.jsonl"}, "run_state.json is not readable"),
    ],
)
def test_what_cannot_be_evaluated(options, message, tmp_path):
    for name in ("hf", "bare", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "bare" / ".metadata").write_text("")
    (tmp_path / "broken" / ".metadata").write_text("")
    (tmp_path / "broken" / "run_state.json").write_text("{}")
    if isinstance(options.get("model"), str):
        options = options | {"model": tmp_path / options["model"]}
    nothing = {"config": None, "model": None, "benchmarks": None, "samples": None, "out": None, "overrides": []}
    with pytest.raises(UserError, match=message):
        requested(**nothing | options)
