"""Settings of FP8 that contradict each other."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.mcore.batch import token_multiple
from megatron_paint.planning.hardware import use_transformer_engine


def load(**megatron: object):
    model = {"hf_path": "m", "dtype": "bfloat16"}
    return settings_of({"model": model, "data": {"train": "p"}, "run": {"dir": "r"}, "megatron": megatron})


@pytest.mark.parametrize(
    ("megatron", "message"),
    [
        ({"fp8_emulate": True}, "megatron.fp8 is null: set it to hybrid or e4m3"),
        ({"fp8_emulate": True, "fp8": "hybrid", "fp8_recipe": "delayed"}, "the recipes tensorwise and blockwise, and"),
        (
            {"fp8_emulate": True, "fp8": "hybrid", "fp8_recipe": "mxfp8"},
            "megatron.fp8_recipe=mxfp8: set one of the two",
        ),
        (
            {"fp8_emulate": True, "fp8": "e4m3", "transformer_impl": "transformer_engine"},
            "megatron.transformer_impl=transformer_engine: set transformer_impl to auto or local",
        ),
    ],
)
def test_emulation_is_refused(megatron, message):
    with pytest.raises(UserError, match=message):
        load(**megatron)


def test_delayed_scaling_has_no_layers_in_bfloat16():
    """Megatron refuses it; without FP8, or with another recipe, it accepts the setting."""
    given = {"first_last_layers_bf16": True, "fp8_recipe": "delayed"}
    with pytest.raises(UserError, match=r"fp8_recipe=delayed: set it to false, or choose another recipe"):
        load(**given, fp8="hybrid")
    load(**given)
    load(**{**given, "fp8": "hybrid", "fp8_recipe": "tensorwise"})


def test_emulation_needs_no_gpu():
    megatron = load(fp8_emulate=True, fp8="hybrid").megatron
    assert not use_transformer_engine(megatron)
    with pytest.raises(UserError, match="no CUDA device was found; set fp8=null, or fp8_emulate=true"):
        use_transformer_engine(load(fp8="hybrid").megatron)


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 32), ("blockwise", 256)])
def test_emulation_pads_as_fp8_does(recipe, multiple):
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert token_multiple(MegatronSettings(fp8="hybrid", fp8_recipe=recipe, fp8_emulate=True, **sizes)) == multiple


def test_local_layers_compute_no_fp8():
    """They would train in bfloat16 without a word."""
    with pytest.raises(UserError, match=r"^megatron.fp8=hybrid is computed by layers of Transformer Engine, and"):
        load(fp8="hybrid", transformer_impl="local")
    load(fp8="hybrid", fp8_recipe="blockwise", fp8_emulate=True, transformer_impl="local")
