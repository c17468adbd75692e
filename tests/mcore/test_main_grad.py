"""The output layer's gradient in Megatron's buffer: its hooks, overlapped reductions, tied weights, loss scales."""

import pytest
import torch

from tests.mcore import parity_cases as parity
from tests.mcore.layouts import run_worker


@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "tp2-dp2", "pp2-vp2"])
def test_buffer_equals_autograd(layout, tmp_path):
    """Several micro-batches a replica, float32: which way the gradient takes changes its rounding alone."""
    parity.make_checkpoints(tmp_path)
    run_worker("main_grad_worker", layout, tmp_path, tmp_path)
    for kind in ("tied", "untied"):
        found = torch.load(tmp_path / f"{kind}.pt")
        wanted = found.pop("autograd")
        assert all(gradient.norm() > 0 for gradient in wanted.values())
        for gradients in found.values():
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                assert (gradient - wanted[name]).norm() <= 5e-6 * wanted[name].norm(), name
