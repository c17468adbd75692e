"""Megatron's gradient buffers, known here by the attributes that its data-parallel wrapper gives a parameter.

`main_grad`: the buffer that is reduced over ranks and stepped on, float32 as a rule, zeroed once a step.
`grad_added_to_main_grad`: set by whoever added a parameter's gradient to the buffer itself; the wrapper's hook then
drops what autograd collected. `zero_out_wgrad`: the hook adds that nonetheless, because the parameter has another user
(a tied embedding). So zeros are returned to autograd: they satisfy the hook, and add nothing where it adds.
"""

from __future__ import annotations

import torch


def main_grad_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The buffer to add this parameter's gradient to, or None where autograd is to carry it.

    Megatron's own FSDP makes its buffers on demand and looks at autograd's gradients: it is left to them.
    """
    if not hasattr(parameter, "grad_added_to_main_grad") or hasattr(parameter, "get_main_grad"):
        return None
    main_grad = getattr(parameter, "main_grad", None)
    return main_grad if isinstance(main_grad, torch.Tensor) and main_grad.shape == parameter.shape else None
