"""Samples all cases at one layout, with decoding steps in fixed tensors and without; rank 0 writes both."""

import dataclasses
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
from megatron_paint.mcore import generate
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore.eager_capture import EagerCapture
from tests.mcore.generation_cases import SAMPLING, requests
from tests.mcore.layouts import layout_of

BUCKETS = (1, 4, 256)


def main() -> None:
    layout, hf_path, out = layout_of(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    settings = Settings(
        model=ModelSettings(hf_path=hf_path, dtype="float32"),
        data=DataSettings(train="unused", micro_batch_tokens=64),
        run=RunSettings(dir="unused"),
        rollout=RolloutSettings(batch_size=4),
        megatron=MegatronSettings(**layout.megatron),
    )
    sampler = MegatronPolicy(settings, read_shape(hf_path), ranks).sampler
    chosen = BUCKETS if ranks.size == 1 else BUCKETS[1:2]
    found = {"buckets": chosen}
    for case, sampling in SAMPLING.items():
        sampling = dataclasses.replace(sampling, max_new_tokens=24)
        sampler.capture = None
        found[case, "usual"] = sampler.generate(requests(), sampling)
        for bucket in chosen:
            made, capture = watched(), EagerCapture()
            sampler.capture, sampler.bucket = (lambda capture=capture: capture), bucket
            found[case, bucket] = sampler.generate(requests(), sampling)
            buckets = [(len(steps.input_L), sorted(steps.replays)) for steps in made]
            found[case, bucket, "captured"] = buckets, capture.captures, capture.replays
    if ranks.rank == 0:
        torch.save(found, out)
    stop_ranks()


def watched() -> list:
    """A list of all `FixedSteps` that the sampler makes from now on."""
    made = []

    def make(*args, **kwargs):
        made.append(MADE(*args, **kwargs))
        return made[-1]

    generate.FixedSteps = make
    return made


MADE = generate.FixedSteps

if __name__ == "__main__":
    main()
