"""Products of a few rows with the output layer, again and again with the same weight, in float32.

Rounding logits to bfloat16 would change the draws. Axes: R rows, V vocabulary (this rank's slice), H hidden size.
"""

import torch
from torch import Tensor

# Packing takes as long as 7 products of 16 rows gain by it (151,936 x 256, one core of an AMD EPYC with AVX-512).
PACK_FROM = 16


class Float32Product:
    """hidden weight^T in float32 for at most `rows` rows, with a weight [V, H] of any type.

    On a CPU a call may overwrite the result of the last one. If `calls` calls are expected to be worth it, the weight
    is copied into oneDNN's layout first. torch.mm would do this again in every call, which takes longer than the
    product itself: 16 rows take 0.4 x the time of torch.mm with the copy, 64 rows 0.8 x.
    """

    def __init__(self, weight_VH: Tensor, *, rows: int, calls: int) -> None:
        self.weight_VH = weight_VH.detach()
        self.packed: Tensor | None = None
        self.buffer_RV: Tensor | None = None
        if weight_VH.is_cuda:
            return
        self.weight_VH = self.weight_VH.float()
        if calls >= PACK_FROM and _can_pack():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight_VH, rows)
            self.weight_VH = weight_VH.detach()  # not a float32 copy beside the packed one
        else:
            # A CPU takes longer to get new memory of this size from the system than to fill it.
            self.buffer_RV = self.weight_VH.new_empty((rows, len(weight_VH)))

    def __call__(self, hidden_RH: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(hidden_RH.float(), self.packed, None, "none", [], "")
        out_RV = None if self.buffer_RV is None else self.buffer_RV[: len(hidden_RH)]
        return float32_product(hidden_RH, self.weight_VH, out=out_RV)


def _can_pack() -> bool:
    """Whether this torch has oneDNN and the operators for packed weights, which torch's compiler uses."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def float32_product(hidden_RH: Tensor, weight_VH: Tensor, *, out: Tensor | None = None) -> Tensor:
    """hidden weight^T in float32 from weights of any type."""
    if hidden_RH.is_cuda and hidden_RH.dtype != torch.float32:
        return torch.mm(hidden_RH, weight_VH.t(), out_dtype=torch.float32)
    return torch.mm(hidden_RH.float(), weight_VH.float().t(), out=out)
