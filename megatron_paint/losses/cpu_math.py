"""Works around a bug of MKL, with which torch computes exp, tanh and similar functions on CPUs.

MKL chooses the kernel of each such function at its first call. If several threads make that first call at once (any
tensor of more than a few thousand elements), one thread can run a kernel of low accuracy on its part of the tensor.
Relative errors of 1e-4 occur once, in about one process of ten. Known as pytorch issue 188792; MKL before 2025.0.
"""

from functools import cache

import torch

_FUNCTIONS = (
    *("exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "tanh", "sinh", "cosh", "sin", "cos", "tan"),
    *("asin", "acos", "atan", "erf", "erfc", "erfinv", "trunc"),
)


@cache
def settle_cpu_math() -> None:
    """Calls every such function once on one number: a single thread does this, and MKL chooses the kernel."""
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(torch, name)(half)
