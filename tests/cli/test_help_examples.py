"""Every command's help has two or three examples, and the parser accepts each."""

import argparse
import shlex

import pytest

from megatron_paint.cli.help_examples import EXAMPLES, WIDTH
from megatron_paint.cli.main import main, make_parser, parse


def all_commands(parser, name=""):
    yield name
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from all_commands(inner, f"{name} {command}".strip())


def test_every_command_has_examples():
    assert set(EXAMPLES) == set(all_commands(make_parser()))


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_help_shows_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    shown = text.split("examples:\n")[1].splitlines()
    assert 2 <= len(EXAMPLES[command]) <= 3
    assert max(map(len, shown)) <= WIDTH
    for arguments, meaning in EXAMPLES[command]:
        assert f"  megatron-paint {arguments}" in "\n".join(shown)
        assert f"# {meaning}" in "\n".join(shown)
        words = shlex.split(arguments)
        assert words[: len(command.split())] == command.split()
        parse(words[: words.index(">")] if ">" in words else words)


def test_the_examples_of_plan_run(tmp_path, monkeypatch, capsys):
    """The parser does not know what `plan` needs besides --gpu-list."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", "qwen3_8b", "paint"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    for arguments, _ in EXAMPLES["plan"]:
        assert main(shlex.split(arguments)) == 0, arguments


def test_the_help_of_evaluate_still_names_compare(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "megatron-paint evaluate compare A B compares two evaluations" in capsys.readouterr().out
