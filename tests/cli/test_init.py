"""`megatron-paint init`: prints settings or one line."""

import pytest

from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from tests.support.finished import ROOT


def test_the_printed_file_is_the_preset(capsys, tmp_path):
    assert main(["init", "qwen3_8b", "paint"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (tmp_path / "my.yaml").write_text(printed.out)
    assert load_settings(tmp_path / "my.yaml") == load_settings(ROOT / "examples" / "qwen3_8b" / "paint.yaml")
    assert "  clip: 0.06 # OPSD's value for 8B, ours for larger models" in printed.out


def test_list(capsys):
    assert main(["init", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].split() == ["qwen3_1p7b", "paint", "grpo", "opsd", "reference_free", "sft", "support"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "init needs a model size and an objective, such as qwen3_8b paint"),
        (["qwen3_8b"], "init needs a model size and an objective"),
        (["qwen3_8", "paint"], "did you mean qwen3_8b?"),
        (["qwen3_8b", "gropo"], "did you mean grpo?"),
        (["--list", "qwen3_8b"], "leave out qwen3_8b or --list"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, says):
    assert main(["init", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
