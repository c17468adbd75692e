"""Samples all cases at one layout; rank 0 writes the rollouts."""

import sys
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import (
    DataSettings,
    ModelSettings,
    RolloutSettings,
    RunSettings,
    Settings,
)
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore.generation_cases import BATCHES, SAMPLING, requests
from tests.mcore.layouts import layout_of


def main() -> None:
    layout, hf_path, out = layout_of(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    megatron = MegatronSettings(**layout.megatron)
    ranks = start_ranks(megatron)
    rollouts = {}
    for name, (batch_size, look_every) in BATCHES.items():
        settings = Settings(
            model=ModelSettings(hf_path=hf_path, dtype="float32"),
            data=DataSettings(train="unused", micro_batch_tokens=64),
            run=RunSettings(dir="unused"),
            rollout=RolloutSettings(batch_size=batch_size),
            megatron=megatron,
        )
        policy = MegatronPolicy(settings, read_shape(hf_path), ranks)
        policy.sampler.look_every = look_every
        for case, sampling in SAMPLING.items():
            rollouts[f"{case}-{name}"] = policy.sampler.generate(requests(), sampling)
        # Another key, another draw; and the answer to one request does not depend on the others.
        rollouts[f"alone-{name}"] = policy.sampler.generate(requests()[2:3], SAMPLING["plain"])
    if ranks.rank == 0:
        torch.save(rollouts, out)
    stop_ranks()


if __name__ == "__main__":
    main()
