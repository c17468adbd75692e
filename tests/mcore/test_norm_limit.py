"""optimizer.grad_norm_skip_threshold: a larger gradient changes nothing, on every rank; a smaller one is as usual."""

import pytest
import torch

from tests.mcore import parity_cases as parity
from tests.mcore.layouts import run_worker


@pytest.mark.parametrize("layout", ["tp2-dp2", "pp2-vp2"])
def test_a_larger_gradient_changes_nothing(layout, tmp_path):
    parity.make_checkpoints(tmp_path)
    run_worker("norm_limit_worker", layout, tmp_path, tmp_path / "found.pt")
    ranks = torch.load(tmp_path / "found.pt")
    norm = ranks[0]["norm"]
    told = f"the gradient's norm, {norm:.4g}, is above optimizer.grad_norm_skip_threshold={0.999 * norm:g}"
    for found in ranks:
        assert found["norm"] == found["norm above"] == norm
        assert found["told"] == told
        assert (found["above is free"], found["below stays"], found["free moves"]) == (True, True, True)
