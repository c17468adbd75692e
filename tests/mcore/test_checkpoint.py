"""Saving and going on: bit for bit at the same layout, the same numbers to rounding at another."""

import pytest
import torch

from tests.mcore import parity_cases as parity
from tests.mcore.checkpoint_worker import CASES, HALF
from tests.mcore.layouts import run_worker
from tests.support.exports import same, weights

WRITER = "tp2-pp2-sp"


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    """(checkpoint folder, output of an unbroken run, output of a broken one) made at the writer's layout."""
    saved, whole, broken = (tmp_path_factory.mktemp(n) for n in ("saved", "whole", "broken"))
    run_worker("checkpoint_worker", WRITER, "all", checkpoints, saved, whole)
    run_worker("checkpoint_worker", WRITER, "first", checkpoints, saved, broken)
    return checkpoints, saved, whole, broken


@pytest.mark.parametrize(
    "layout", [WRITER, "tp1", "tp2-dp2", "pp2", pytest.param("tp2-cp2-sp", marks=pytest.mark.long)]
)
def test_goes_on(layout, folders, tmp_path):
    checkpoints, saved, whole, _ = folders
    run_worker("checkpoint_worker", layout, "rest", checkpoints, saved, tmp_path)
    wanted, found = torch.load(whole / "losses.pt"), torch.load(tmp_path / "losses.pt")
    for case in CASES:
        ours, theirs = weights(tmp_path / case.name), weights(whole / case.name)
        assert ours.keys() == theirs.keys()
        losses = torch.tensor(found[case.name]), torch.tensor(wanted[case.name][HALF:])
        if layout == WRITER:
            assert torch.equal(*losses), case.name
            assert same(ours, theirs), case.name
        elif case.name != "bfloat16":  # another order of sums in bfloat16 is another run
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(*losses, rtol=0.1, atol=0.05)


def test_weights_alone_start_another_run(folders, tmp_path):
    """At another layout than the one that saved them; optimiser and teacher of the old run stay behind."""
    checkpoints, saved, _, broken = folders
    run_worker("checkpoint_worker", "pp2", "warm", checkpoints, saved, tmp_path)
    for case in (CASES[0], CASES[1]):
        ours, theirs = weights(tmp_path / case.name), weights(broken / case.name)
        assert same(ours, theirs), case.name
        start = weights(parity.checkpoint(checkpoints, "start", case.tied))
        assert not all(torch.equal(ours[name], start[name]) for name in ours)
    refusals = {(tmp_path / f"refused{rank}").read_text() for rank in (0, 1)}
    assert len(refusals) == 1
    assert "LoRA" in refusals.pop()


def test_checkpoint_is_marked_complete(folders):
    _, saved, *_ = folders
    for case in CASES:
        assert (saved / case.name / "complete").exists()
        assert not list(saved.glob(".*"))
