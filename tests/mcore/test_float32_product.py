"""Products of a few rows with the output layer: against float64."""

import pytest
import torch

from megatron_paint.mcore.float32_product import PACK_FROM, Float32Product, float32_product

ROWS = 19


def made(dtype: torch.dtype, *, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_RH, weight_VH = (torch.randn(size, 48, generator=generator).to(dtype) for size in (rows, 1001))
    return hidden_RH, weight_VH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("calls", [PACK_FROM - 1, PACK_FROM])
def test_it_is_the_product_in_float32_for_any_number_of_rows(dtype, calls):
    hidden_RH, weight_VH = made(dtype)
    want_RV = hidden_RH.double() @ weight_VH.double().t()
    product = Float32Product(weight_VH.requires_grad_(), rows=ROWS, calls=calls)
    with torch.no_grad():
        for rows in (ROWS, 16, 3, 1):
            found_RV = product(hidden_RH[:rows])
            assert found_RV.dtype == torch.float32
            # Sums of 48 products of size 1 in float32. Logits in bfloat16 would be wrong by 0.05.
            assert (found_RV.double() - want_RV[:rows]).abs().max() <= 2e-5


def test_a_batch_of_many_calls_uses_a_packed_weight():
    _, weight_VH = made(torch.float32)
    assert Float32Product(weight_VH, rows=ROWS, calls=PACK_FROM - 1).packed is None
    packs = Float32Product(weight_VH, rows=ROWS, calls=PACK_FROM).packed is not None
    assert packs == torch.backends.mkldnn.is_available()


def test_without_packing_a_call_reuses_the_memory_of_the_last_one():
    hidden_RH, weight_VH = made(torch.float32)
    product = Float32Product(weight_VH, rows=ROWS, calls=1)
    assert product(hidden_RH).data_ptr() == product(hidden_RH[:2]).data_ptr()
    assert torch.equal(product(hidden_RH[:2]), float32_product(hidden_RH[:2], weight_VH))
