"""Settings that claim Megatron-Core's name and default have them."""

import dataclasses

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_paint.config import describe
from megatron_paint.config.dialect import MEGATRON, MEGATRON_NAME, OURS
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import ModelSettings
from megatron_paint.mcore.model import transformer_config
from tests.planning.test_stages import SHAPE

NOT_IN_A_CONFIG = {"distributed_timeout_minutes"}  # an argument of initialize_model_parallel
OF_OURS = {"fp8_emulate"}


def test_names_and_defaults_are_megatron_s():
    theirs = {
        field.name: "fp32" if field.default is torch.float32 else field.default
        for config in (OptimizerConfig, DistributedDataParallelConfig, TransformerConfig)
        for field in dataclasses.fields(config)
    }
    (section,) = describe.find("megatron")
    for setting in section.settings:
        name = setting.key.removeprefix("megatron.")
        if name in OF_OURS:
            assert setting.source == OURS
            assert name not in theirs
            continue
        assert setting.source in (MEGATRON, MEGATRON_NAME), name
        assert name in theirs or name in NOT_IN_A_CONFIG, name
        if setting.source == MEGATRON:
            assert setting.default == theirs[name], name
        elif name in theirs:
            assert setting.default != theirs[name], name


@pytest.mark.parametrize(
    ("granularity", "passed"), [("full", ("uniform", 1)), ("selective", (None, None)), (None, (None, None))]
)
def test_one_override_of_a_preset_changes_the_recomputation(granularity, passed):
    """The presets set all three; Megatron refuses the other two with selective recomputation."""
    megatron = MegatronSettings(recompute_granularity=granularity, recompute_method="uniform", recompute_num_layers=1)
    config = transformer_config(SHAPE, ModelSettings(hf_path="m"), megatron)
    assert config.recompute_granularity == granularity
    assert (config.recompute_method, config.recompute_num_layers) == passed
