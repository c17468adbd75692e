"""At one layout: every message of the weights, and an export of the same weights."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.mcore.device_weights import ReplicaWeights
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.mcore.weight_source import StageWeights
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore import expert_cases
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import EXPERT_LAYOUTS, layout_of
from tests.mcore.parity_worker import settings_of

CASES = {case.name: case for case in parity.CASES if case.name in ("full-initial-sgd", "lora-initial-adam")}
EXPERT_CASES = {
    case.name: case for case in expert_cases.CASES if case.name in ("full-initial-sgd", "lora-experts-initial-sgd")
}
SIZES = (1, 20_000, 10**9)


def main() -> None:
    layout, folder, out = layout_of(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    cases = EXPERT_CASES if sys.argv[1] in EXPERT_LAYOUTS else CASES
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    for name, case in cases.items():
        if not expert_cases.fits(case, layout):
            continue
        for dtype in ("float32", "bfloat16"):
            settings = settings_of(case, folder, layout.megatron)
            settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=dtype))
            shape = read_shape(settings.model.hf_path)
            policy = MegatronPolicy(settings, shape, ranks)
            weights = StageWeights(policy.stage, shape, ranks, settings.model)
            for size in SIZES:
                send(weights, out / f"{name}-{dtype}-{size}", size, ranks.rank)
            weights.export(out / f"{name}-{dtype}-export")
            for which in ("first", "all"):
                complete = ReplicaWeights(policy.stage, shape, ranks, settings.model, all_replicas=which == "all")
                send_complete(complete, out / f"{name}-{dtype}-{which}", ranks.rank)
    spoil(policy.stage, ranks)
    told = ""
    try:
        weights.check_finite()
    except UserError as error:
        told = str(error)
    (out / f"told-{ranks.rank}").write_text(told)
    stop_ranks()


def send(weights: StageWeights, folder: Path, size: int, rank: int) -> None:
    folder.mkdir(exist_ok=True)
    plan = weights.plan(size)
    (folder / f"plan-{rank}.json").write_text(json.dumps([plan, {n: list(s) for n, s in weights.shapes().items()}]))
    for number in range(50):
        if tensors := weights.message(number):
            assert list(tensors) == plan[number]
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / f"{rank}-{number}.st")


def send_complete(weights: ReplicaWeights, folder: Path, rank: int) -> None:
    """What this rank has of all messages, in two passes, which must be alike."""
    folder.mkdir(exist_ok=True)
    plan = weights.plan(SIZES[1])
    passes = [[weights.message(number) for number in range(len(plan))] for _ in range(2)]
    named = [list(tensors) for tensors in passes[0]]
    (folder / f"plan-{rank}.json").write_text(
        json.dumps([plan, named, {name: list(shape) for name, shape in weights.shapes().items()}])
    )
    found, again = ({name: t for tensors in messages for name, t in tensors.items()} for messages in passes)
    assert all(torch.equal(found[name], again[name]) for name in again)
    assert all(tensor.is_contiguous() for tensor in found.values())
    if found:
        save_file(found, folder / f"{rank}.st")


@torch.no_grad()
def spoil(stage, ranks) -> None:
    """One number of the last layer's output projection, on one rank."""
    if ranks.is_last_stage and ranks.tp_rank == ranks.tp_size - 1 and ranks.dp_cp_rank == 0:
        stage.layers[max(stage.layers)].self_attention.linear_proj.weight[0, 0] = torch.nan


if __name__ == "__main__":
    main()
