"""MKL's functions are called by one thread before several threads call them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    "logprobs": lambda: token_logprobs(
        VALUES_TV, torch.zeros(7, 5), torch.arange(3), vocab=WholeVocab(), kernel="torch"
    ),
}


class Calls(TorchDispatchMode):
    """Writes down each call of torch's elementwise functions: name and number of elements."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in FUNCTIONS:
            self.found.append((name, args[0].numel()))
        return func(*args, **(kwargs or {}))


FUNCTIONS = {"exp", "expm1", "log", "log1p", "tanh", "sqrt", "rsqrt", "sigmoid"}


@pytest.mark.parametrize("name", CALLS)
def test_first_calls_are_of_one_number(name):
    settle_cpu_math.cache_clear()
    with Calls() as calls:
        CALLS[name]()
    first: dict[str, int] = {}
    for function, numbers in calls.found:
        first.setdefault(function, numbers)
    assert set(first.values()) == {1}
    assert any(numbers > 1 for _, numbers in calls.found)
    with Calls() as again:
        CALLS[name]()
    assert (("exp", 1) in calls.found, ("exp", 1) in again.found) == (True, False)  # once in a process
