"""Megatron's gradient buffers, found by the attributes that its data-parallel wrapper sets on a parameter.

`main_grad`: the buffer that is reduced over ranks and used by the optimiser, usually float32, zeroed once a step.
`grad_added_to_main_grad`: set by code that added a parameter's gradient to the buffer; the wrapper's hook then drops
autograd's gradient. `zero_out_wgrad`: the hook adds autograd's gradient anyway, because the parameter has another user
(a tied embedding). So the loss returns zeros to autograd: the hook gets a gradient, and adding it changes nothing.
"""

from __future__ import annotations

import torch


def main_grad_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The buffer to add this parameter's gradient to; None: return the gradient to autograd.

    Megatron's own FSDP creates its buffers on demand and reads autograd's gradients, so it gets None.
    """
    if not hasattr(parameter, "grad_added_to_main_grad") or hasattr(parameter, "get_main_grad"):
        return None
    main_grad = getattr(parameter, "main_grad", None)
    return main_grad if isinstance(main_grad, torch.Tensor) and main_grad.shape == parameter.shape else None
