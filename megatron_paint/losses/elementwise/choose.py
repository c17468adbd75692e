"""Chooses the backend of the loss's elementwise work: Triton on a GPU, torch elsewhere."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from megatron_paint.base.errors import UserError, about
from megatron_paint.config.loss import InterpolationLossConfig, Kernel
from megatron_paint.losses.elementwise.interface import Passes
from megatron_paint.losses.elementwise.token import TokenPasses, TorchTokenPasses
from megatron_paint.losses.elementwise.torch_backend import TorchPasses


def choose_kernel(kernel: Kernel, *, device: torch.device, dtype: torch.dtype) -> Literal["torch", "triton"]:
    """The kernel for logits of this type on this device.

    auto: Triton, or torch where CUDA or Triton is missing, with one warning. triton: UserError where either is missing;
    under TRITON_INTERPRET=1 the kernels also run on a CPU, slowly, for tests. float64 logits always use torch.
    """
    missing = missing_for_triton(device)
    with about("kernel"):
        chosen = _choose(kernel, missing, dtype)
    if kernel == "auto" and missing is not None and dtype != torch.float64:
        _warn_once(missing)
    return chosen


def loss_kernel(kernel: Kernel) -> Literal["torch", "triton"]:
    """The kernel that a run on this machine uses; UserError, naming the setting, where triton cannot be used."""
    with about("objective.kernel"):
        return _choose(kernel, missing_for_triton(), torch.float32)


def missing_for_triton(device: torch.device | None = None) -> str | None:
    """What the Triton kernels need and do not find, for tensors on this device; None: nothing is missing.

    Without a device: for tensors on a GPU of this machine.
    """
    if device is None and not torch.cuda.is_available():
        return "no CUDA device was found"
    if device is not None and device.type != "cuda":
        return f"these tensors are on {device.type}"
    return None if find_spec("triton") else "Triton is not installed (pip install triton)"


def _choose(kernel: Kernel, missing: str | None, dtype: torch.dtype) -> Literal["torch", "triton"]:
    if kernel not in get_args(Kernel):
        raise UserError(f"got {kernel!r}; it is one of {', '.join(get_args(Kernel))}; auto suits every machine")
    if kernel == "triton" and missing is not None and not _interprets():
        raise UserError(f"got 'triton'; it needs CUDA and Triton, and {missing}; set auto or torch")
    if kernel == "torch" or dtype == torch.float64 or (kernel == "auto" and missing is not None):
        return "torch"
    return "triton"


def make_passes(
    kernel: Literal["torch", "triton"], config: InterpolationLossConfig, *, elements: int, dlogits_dtype: torch.dtype
) -> Passes:
    """The passes of the chosen kernel; elements: entries of a torch tile; dlogits_dtype: of Triton's gradient."""
    if kernel == "torch":
        return TorchPasses(config, elements=elements)
    # Triton may be missing, and its import takes a second.
    from megatron_paint.losses.elementwise.triton_backend import TritonPasses

    return TritonPasses(config, dlogits_dtype=dlogits_dtype)


def make_token_passes(kernel: Literal["torch", "triton"], *, elements: int, dlogits_dtype: torch.dtype) -> TokenPasses:
    """The same for token_logprobs."""
    if kernel == "torch":
        return TorchTokenPasses(elements=elements)
    from megatron_paint.losses.elementwise.triton_backend import TritonTokenPasses

    return TritonTokenPasses(dlogits_dtype=dlogits_dtype)


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


@cache
def _warn_once(missing: str) -> None:
    warnings.warn(f"torch, not Triton, does the loss's elementwise work: {missing}", stacklevel=4)
