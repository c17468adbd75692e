"""MKL's functions are called by one thread before several threads call them."""

import pytest
import torch

from megatron_paint.losses import (
    InterpolationLossConfig,
    WholeVocab,
    fused_interpolation_loss,
    interpolation_loss,
    token_logprobs,
)
from megatron_paint.losses.cpu_math import settle_cpu_math

VALUES_TV = torch.zeros(3, 5)
CALLS = {
    "fused": lambda: fused_interpolation_loss(
        VALUES_TV,
        torch.zeros(7, 5),
        VALUES_TV,
        lengths=[3],
        config=InterpolationLossConfig(),
        vocab=WholeVocab(),
        kernel="torch",
    ),
    "reference": lambda: interpolation_loss(VALUES_TV, VALUES_TV, lengths=[3], config=InterpolationLossConfig()),
    "logprobs": lambda: token_logprobs(VALUES_TV, torch.zeros(7, 5), torch.arange(3), vocab=WholeVocab()),
}


@pytest.mark.parametrize("name", CALLS)
def test_first_calls_are_of_one_number(name, monkeypatch):
    sizes = []
    original = torch.exp

    def exp(values, **kwargs):
        sizes.append((values.numel(), values.dtype))
        return original(values, **kwargs)

    monkeypatch.setattr(torch, "exp", exp)
    settle_cpu_math.cache_clear()
    CALLS[name]()
    assert sizes[:2] == [(1, torch.float32), (1, torch.float64)]
    sizes.clear()
    CALLS[name]()
    assert (1, torch.float64) not in sizes  # once in a process
