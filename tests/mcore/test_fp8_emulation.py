"""FP8 by emulation: rounding and products against their definition, whole models over layouts, which layers have it."""

import itertools
import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_paint.mcore.fp8_emulation import E4M3, E5M2, Fp8Product, Rounding
from tests.mcore.layouts import run_worker

DTYPES = {"e4m3": E4M3, "e5m2": E5M2}
SIZES = {  # every rank's part of every matrix has complete blocks of 128 at TP 2
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}


def values_of(dtype: torch.dtype) -> list[float]:
    """Every finite value of an FP8 type, from its bits."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return sorted(set(every[every.isfinite()].tolist()))


def nearest(value: float, values: list[float]) -> float:
    """The nearest of the values; of two, the one whose last bit is 0. Beyond the last one, the last one."""
    at = sorted(range(len(values)), key=lambda i: abs(values[i] - value))[:2]
    if abs(values[at[0]] - value) == abs(values[at[1]] - value):
        zero = values.index(0.0)
        return next(values[i] for i in at if (i - zero) % 2 == 0)
    return values[at[0]]


def rounded(tensor: torch.Tensor, dtype: torch.dtype, *, rows: int, columns: int, powers: bool) -> torch.Tensor:
    """Block by block and value by value, in float64."""
    values, found = values_of(dtype), tensor.double().clone()
    for i, j in itertools.product(range(0, len(tensor), rows), range(0, tensor.shape[1], columns)):
        block = found[i : i + rows, j : j + columns]
        scale = max(values) / max(float(block.abs().max()), 1e-12)
        scale = 2.0 ** math.floor(math.log2(scale)) if powers else scale
        for a, b in itertools.product(range(len(block)), range(block.shape[1])):
            block[a, b] = nearest(float(block[a, b]) * scale, values) / scale
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blockwise", [False, True])
def test_rounding(blockwise, dtype):
    """Rows with zeros and with values of all sizes; 150 columns, so the last blocks are smaller."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(5, 150, generator=generator) * torch.logspace(-3, 3, 5)[:, None]
    tensor[3] = 0.0
    found = Rounding(blockwise=blockwise, gradients=E5M2).rows(tensor, DTYPES[dtype])
    blocks = {"rows": 1, "columns": 128} if blockwise else {"rows": 5, "columns": 150}
    wanted = rounded(tensor, DTYPES[dtype], **blocks, powers=blockwise)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


def test_rounding_of_a_weight():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(130, 129, generator=generator)
    found = Rounding(blockwise=True, gradients=E5M2).weight(weight)
    torch.testing.assert_close(
        found.double(), rounded(weight, E4M3, rows=128, columns=128, powers=True), rtol=1e-6, atol=0
    )
    assert torch.equal(Rounding(blockwise=True, gradients=E5M2).weight(weight.T.contiguous()), found.T)


def test_one_scale_gives_what_torchs_own_product_gives():
    """torch multiplies FP8 tensors itself on this CPU: an implementation that shares no code with ours."""
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(32, 64, generator=generator), torch.randn(48, 64, generator=generator)
    scales = [448.0 / t.abs().max() for t in (x, weight)]
    quantised = [(t * scale).to(E4M3) for t, scale in zip((x, weight), scales, strict=True)]
    inverse = [(1 / scale).float() for scale in scales]
    wanted = torch._scaled_mm(quantised[0], quantised[1].t(), *inverse, out_dtype=torch.float32)
    found = product(blockwise=False, gradients=E5M2)(x, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def product(**rounding) -> Fp8Product:
    return Fp8Product(Rounding(**rounding), None)


@pytest.mark.parametrize("gradients", DTYPES)
@pytest.mark.parametrize("blockwise", [False, True])
def test_gradients_are_products_of_rounded_values(blockwise, gradients):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 1, 160, generator=generator, requires_grad=True)
    weight = torch.randn(140, 160, generator=generator, requires_grad=True)
    rounding = Rounding(blockwise=blockwise, gradients=DTYPES[gradients])
    output = Fp8Product(rounding, None)(x, weight)
    grad = torch.randn(output.shape, generator=generator)
    output.backward(grad)
    whole = {"rows": 10**6, "columns": 10**6, "powers": False}
    row, block = ({"rows": 1, "columns": 128, "powers": True}, {"rows": 128, "columns": 128, "powers": True})
    row, block = (row, block) if blockwise else (whole, whole)
    x_TI, weight_OI, grad_TO = x.detach()[:, 0], weight.detach(), grad[:, 0]
    rounded_weight = rounded(weight_OI, E4M3, **block)
    wanted = rounded(x_TI, E4M3, **row) @ rounded_weight.T
    torch.testing.assert_close(output.detach()[:, 0].double(), wanted, rtol=1e-5, atol=1e-4)
    wanted = rounded(grad_TO, DTYPES[gradients], **row) @ rounded_weight
    torch.testing.assert_close(x.grad[:, 0].double(), wanted, rtol=1e-5, atol=1e-4)
    wanted = rounded(grad_TO.T, DTYPES[gradients], **row) @ rounded(x_TI.T, E4M3, **row).T
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("blockwise", [False, True])
def test_an_expert_without_a_token(blockwise):
    x, weight = torch.empty(0, 1, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    output = product(blockwise=blockwise, gradients=E5M2)(x, weight)
    assert output.shape == (0, 1, 8)
    output.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(4, 1, 16, requires_grad=True), torch.randn(8, 16)
    product(blockwise=True, gradients=E4M3)(x, weight).sum().backward()
    assert x.grad is not None


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What one rank and two tensor-parallel ranks computed."""
    folder = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(folder / "model")
    for layout in ("tp1", "tp2-dp2", "tp2-pp2-sp"):
        run_worker("fp8_worker", layout, folder / "model", folder / f"{layout}.pt")
    return {layout: torch.load(folder / f"{layout}.pt") for layout in ("tp1", "tp2-dp2", "tp2-pp2-sp")}


def cosine(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    flat = [torch.cat([part[name].double().flatten() for name in sorted(part)]) for part in (one, other)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_step_with_fp8_is_noisy_and_not_wrong(recipe, found):
    """Its gradient is turned, by a like angle with both recipes. The report states this angle."""
    one = found["tp1"]
    noise = cosine(one[recipe]["gradient"], one["none"]["gradient"])
    assert 0.95 < noise < 0.998
    assert one[recipe]["reported"] == pytest.approx(noise, abs=1e-6)
    assert one[recipe]["loss"] == pytest.approx(one["none"]["loss"], rel=2e-2)
    assert one[recipe]["loss"] != one["none"]["loss"]


def test_blockwise_scales_do_not_see_other_rows(found):
    """So the loss of the model against itself shows no noise, though the gradient has it."""
    assert found["tp1"]["blockwise"]["itself"] < 1e-6
    assert found["tp1"]["tensorwise"]["itself"] > 1e-4


@pytest.mark.parametrize("layout", ["tp2-dp2", "tp2-pp2-sp"])
def test_layouts_round_alike(layout, found):
    """With blocks that lie within a rank, two ranks round what one rank rounds.

    A difference of float32's rounding moves a few values to the next one of FP8, so this is no equality. It is many
    times closer than FP8 is to no FP8.
    """
    one, two = found["tp1"], found[layout]
    assert 1 - cosine(two["blockwise"]["gradient"], one["blockwise"]["gradient"]) < 0.02 * (
        1 - cosine(one["blockwise"]["gradient"], one["none"]["gradient"])
    )
    assert two["blockwise"]["reported"] == pytest.approx(one["blockwise"]["reported"], abs=2e-4)
    assert 0.95 < two["tensorwise"]["reported"] < 0.998


def test_the_first_and_last_layers_stay_without_fp8(found):
    assert found["tp1"]["layers"] == {"all": [1, 2, 3, 4], "not the first two and the last": [3]}
