"""What a search checks before its first trial, with --dry-run too."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.main import main
from megatron_paint.search.checks import check_places
from megatron_paint.search.trial_run import places
from tests.search.spaces import ROOT, SETTINGS, write_space


@pytest.mark.parametrize("options", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=3", "megatron.tensor_model_parallel_size=2"], "3 processes cannot be laid out as tensor_model_"),
        (["domains={own: {grader: 'nowhere:check'}}", "evaluation.domain=own"], "domains.own.grader=nowhere:check can"),
    ],
)
def test_a_mistake_is_found_before_any_trial(tmp_path, monkeypatch, capsys, options, arguments, message):
    monkeypatch.chdir(ROOT)
    space, out = write_space(tmp_path), tmp_path / "out"
    assert main(["search", str(SETTINGS), str(space), "--out", str(out), *options, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("jobs", "gpus", "asked", "message"),
    [
        (3, "01", None, "--jobs=3 is above the number of GPUs here, 2"),
        (2, "0123", 3, "--processes=3 is above the number of GPUs of a trial, 2"),
        (2, "0123", 2, None),
        (2, "", 8, None),
    ],
)
def test_gpus_for_all_trials(jobs, gpus, asked, message):
    found = places(jobs=jobs, processes=asked, gpus=list(gpus), cores=8, ranks=1)
    if message is None:
        check_places(found, gpus=gpus, asked=asked)
    else:
        with pytest.raises(UserError, match=f"^{message}"):
            check_places(found, gpus=gpus, asked=asked)


def test_gpus_that_stay_unused_are_named():
    from megatron_paint.cli.search import _place_lines

    gpus = list("01234567")
    lines = _place_lines(places(jobs=3, processes=None, gpus=gpus, cores=64, ranks=1), gpus)
    assert lines == [
        "places     3, each with 2 ranks on 2 GPUs; GPUs 6, 7 stay unused, because all trials get equally many"
    ]
