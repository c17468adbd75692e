"""Which kernel does the loss's elementwise work: Triton's on a GPU, torch's elsewhere."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.loss import InterpolationLossConfig, Kernel
from megatron_paint.losses.elementwise.interface import Passes
from megatron_paint.losses.elementwise.token import TokenPasses, TorchTokenPasses
from megatron_paint.losses.elementwise.torch_backend import TorchPasses


def choose_kernel(kernel: Kernel, *, device: torch.device, dtype: torch.dtype) -> Literal["torch", "triton"]:
    """The kernel for logits of this type on this device.

    auto: Triton, or torch where CUDA or Triton is missing, which it says once. triton: ValueError where either is
    missing; under TRITON_INTERPRET=1 the kernels run on a CPU too, slowly, for tests. float64 is always torch's.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(
            f"kernel: got {kernel!r}; it is one of {', '.join(get_args(Kernel))}; auto suits every machine"
        )
    lacking = _what_triton_lacks(device)
    if kernel == "triton" and lacking is not None and not (_interprets() and find_spec("triton")):
        raise ValueError(f"kernel: got 'triton'; it needs CUDA and Triton, and {lacking}; set auto or torch")
    if kernel == "torch" or dtype == torch.float64:
        return "torch"
    if kernel == "auto" and lacking is not None:
        _say_once(lacking)
        return "torch"
    return "triton"


def triton_is_lacking() -> str | None:
    """Why the loss's Triton kernels cannot be used here, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    return "Triton is not installed (pip install triton)" if find_spec("triton") is None else None


def loss_kernel(asked: Kernel) -> Literal["torch", "triton"]:
    """Who does the loss's elementwise work on this machine; UserError where triton is asked for and cannot be used."""
    lacking = triton_is_lacking()
    if asked == "triton" and lacking:
        raise UserError(f"objective.kernel=triton: {lacking}; set it to auto or torch")
    if asked == "auto":
        return "torch" if lacking else "triton"
    return asked


def make_passes(
    kernel: Literal["torch", "triton"], config: InterpolationLossConfig, *, elements: int, dlogits_dtype: torch.dtype
) -> Passes:
    """The chosen kernel's passes; elements: entries of one of torch's tiles; dlogits_dtype: of Triton's gradient."""
    if kernel == "torch":
        return TorchPasses(config, elements=elements)
    from megatron_paint.losses.elementwise.triton_backend import (
        TritonPasses,  # Triton may be missing, and its import takes a second
    )

    return TritonPasses(config, dlogits_dtype=dlogits_dtype)


def make_token_passes(kernel: Literal["torch", "triton"], *, elements: int, dlogits_dtype: torch.dtype) -> TokenPasses:
    """The same for token_logprobs."""
    if kernel == "torch":
        return TorchTokenPasses(elements=elements)
    from megatron_paint.losses.elementwise.triton_backend import TritonTokenPasses

    return TritonTokenPasses(dlogits_dtype=dlogits_dtype)


def _what_triton_lacks(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"these tensors are on {device.type}"
    return "Triton is not installed" if find_spec("triton") is None else None


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _say_once(lacking: str) -> None:
    warnings.warn(f"the loss's elementwise work is done by torch, not Triton: {lacking}", stacklevel=4)
