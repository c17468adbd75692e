"""Settings that claim Megatron-Core's name and default have them."""

import dataclasses

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_paint.config import describe
from megatron_paint.config.dialect import MEGATRON, MEGATRON_NAME, OURS

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
