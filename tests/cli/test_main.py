"""The command line's grammar: overrides anywhere after the settings file, and one line for what is neither."""

import pytest

from megatron_paint.cli.main import main, parse

OVERRIDES = ["optimizer.lr=1e-4", "run.steps=3"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "s.yaml", *OVERRIDES, "--processes", "4", "--dry-run"],
        ["train", "s.yaml", "--processes", "4", *OVERRIDES, "--dry-run"],
        ["train", "s.yaml", "--processes", "4", "--dry-run", *OVERRIDES],
        ["train", "s.yaml", OVERRIDES[0], "--processes=4", OVERRIDES[1], "--dry-run"],
        ["train", "--processes", "4", "s.yaml", OVERRIDES[0], "--dry-run", OVERRIDES[1]],
        ["train", "--processes", "4", "--dry-run", "s.yaml", *OVERRIDES],
    ],
    ids=" ".join,
)
def test_overrides_stand_anywhere(arguments):
    options = parse(arguments)
    assert (options.config.name, options.overrides) == ("s.yaml", OVERRIDES)
    assert (options.processes, options.dry_run, options.quiet) == (4, True, False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "s.yaml", "--procesess", "4"], "unknown argument '--procesess'"),
        (["train", "s.yaml", "--procesess", "4"], "did you mean --processes? (see megatron-paint train --help)"),
        (["train", "s.yaml", "--dryrun"], "unknown argument '--dryrun': did you mean --dry-run?"),
        (["train", "s.yaml", "--optimizer.lr=1e-4"], "did you mean optimizer.lr=1e-4?"),
        (["launch", "slurm", "s.yaml", "--nodes=2", "--accont=x"], "did you mean --account"),
        (["tran", "s.yaml"], "unknown command 'tran': did you mean train? (see megatron-paint --help)"),
        (["inspect", "sample", "runs/x"], "unknown command 'sample': did you mean samples?"),
        (["launch", "slurm", "s.yaml", "--launcher", "torchrn"], "'torchrn': did you mean torchrun?"),
        (["train", "s.yaml", "run.steps=3", "--foo=3"], "unknown argument '--foo=3'"),
        (["train", "s.yaml", "--processes", "four"], "argument --processes: invalid int value: 'four'"),
        (["train"], "SETTINGS.yaml"),
        (["evaluate", "s.yaml", "--out"], "--out"),
        (["doctor", "a=1"], "unknown argument 'a=1'"),
        (["finetune"], "unknown command 'finetune': choose from train, search, evaluate"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_neither_is_one_line(capsys, arguments, says):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-paint: error: ")
    assert says in line


def test_what_is_not_an_override_is_named(capsys, tmp_path):
    (tmp_path / "s.yaml").write_text("run: {dir: r}\n")
    for command in ("train", "evaluate"):
        assert main([command, str(tmp_path / "s.yaml"), "--processes", "1", "optimizer.lr"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "'optimizer.lr' is not key=value" in line


def test_an_unquoted_path_with_a_space(capsys):
    assert main(["train", "my", "folder/settings.yaml", "--processes", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'folder/settings.yaml' is not key=value" in line
    assert line.endswith("write no space around =, and a path with spaces in quotes")


@pytest.mark.parametrize(
    ("kept", "rank", "lines"),
    [
        ((), "0", ["megatron-paint: ended by SIGINT"]),
        ((), "1", []),
        (("step_000002 is kept",), "0", ["megatron-paint: ended by SIGINT; step_000002 is kept"]),
    ],
)
def test_control_c_is_one_line_of_rank_0(capsys, monkeypatch, kept, rank, lines):
    def interrupted(_):
        raise KeyboardInterrupt(*kept)

    monkeypatch.setattr("megatron_paint.cli.main.parse", interrupted)
    monkeypatch.setenv("RANK", rank)
    assert main(["train", "s.yaml"]) == 130
    assert capsys.readouterr().err.splitlines() == lines
