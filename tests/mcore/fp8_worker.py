"""Computes losses and gradients with emulated FP8 at a layout: LAYOUT MODEL OUT."""

import dataclasses
import sys
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import DataSettings, ModelSettings, RunSettings, Settings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import CrossEntropyLoss, DistillationLoss
from megatron_paint.mcore.fp8_emulation import Fp8Product
from megatron_paint.mcore.model import build_model
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.records import Problem, Rollout, Sample
from tests.mcore.layouts import LAYOUTS
from tests.mcore.parity_worker import gradients

KINDS = {
    "none": {},
    **{name: {"fp8": "hybrid", "fp8_recipe": name, "fp8_emulate": True} for name in ("tensorwise", "blockwise")},
}


def settings_of(model: str, megatron: dict) -> Settings:
    return Settings(
        # Float32: only the products of the blocks round. The settings of a run ask for bfloat16.
        model=ModelSettings(hf_path=model, dtype="float32"),
        data=DataSettings(train="unused", micro_batch_tokens=256),
        run=RunSettings(dir="unused"),
        megatron=MegatronSettings(**megatron),
    )


def records() -> list[Sample]:
    generator = torch.Generator().manual_seed(4)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 64, (count,), generator=generator).tolist())

    prompts = [draw(n) for n in (20, 9, 15, 30)]
    return [
        Sample(
            problem=Problem(id=str(i), problem="", solution="", answer=""),
            key=i,
            rollout=Rollout(problem_id=str(i), prompt_ids=prompt, response_ids=draw(40 - 5 * i)),
            teacher_prompt_ids=prompt,
        )
        for i, prompt in enumerate(prompts)
    ]


def layers_with_fp8(stage) -> list[int]:
    found = {}
    for layer in stage.layers.values():
        products = [m for m in layer.modules() if isinstance(getattr(m, "_forward_impl", None), Fp8Product)]
        found[layer.layer_number] = len(products)
    assert set(found.values()) <= {0, 4}
    return [number for number, count in found.items() if count]


def main() -> None:
    layout, model, out = LAYOUTS[sys.argv[1]], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    shape, samples, found = read_shape(model), records(), {}
    cross_entropy = CrossEntropyLoss(chunk_bytes=1e9)
    itself = DistillationLoss(config=InterpolationLossConfig(positions="none"), chunk_bytes=1e9, token_temperature=1.0)
    for kind, fp8 in KINDS.items():
        # With the distributed optimiser a rank has the summed gradients of its shard alone.
        plain = layout.megatron | {"use_distributed_optimizer": False}
        policy = MegatronPolicy(settings_of(model, plain | fp8), shape, ranks)
        scores = policy.backward(samples, cross_entropy, policy.teacher_states(samples, cross_entropy))
        found[kind] = {"loss": sum(score.loss_sum for score in scores), "gradient": gradients(policy)}
        alone = policy.evaluate_loss(samples, itself, teach_itself=True)
        found[kind]["itself"] = sum(s.loss_sum for s in alone) / sum(s.num_tokens for s in alone)
        sharded = MegatronPolicy(settings_of(model, layout.megatron | fp8), shape, ranks)
        found[kind]["reported"] = sharded.fp8_gradient_cosine(samples, cross_entropy)
    settings = settings_of(model, layout.megatron | KINDS["blockwise"])
    some = dataclasses.replace(settings.megatron, first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    found["layers"] = {
        name: layers_with_fp8(build_model(shape, settings.model, megatron, ranks))
        for name, megatron in {"all": settings.megatron, "not the first two and the last": some}.items()
    }
    if ranks.rank == 0:
        torch.save(found, out)
    stop_ranks()


if __name__ == "__main__":
    main()
