"""At one layout: loads a Hugging Face folder, saves and loads a Megatron checkpoint, and computes logits."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import ModelSettings
from megatron_paint.mcore.attention import token_rows
from megatron_paint.mcore.checkpoint import load_weights
from megatron_paint.mcore.float32_product import float32_product
from megatron_paint.mcore.hf_checkpoint import load_stage
from megatron_paint.mcore.model import build_model
from megatron_paint.mcore.ranks import Ranks, start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.convert.family import LAYOUTS, MEMBERS, TOKENS


def logits(stage, ranks) -> torch.Tensor | None:
    """Returns the full logits [T, V] on tensor-parallel rank 0 of the last stage."""
    ids_T = torch.tensor(TOKENS)
    rows = token_rows([len(TOKENS)], device=ranks.device)
    if not ranks.is_first_stage:
        received = torch.empty((len(TOKENS), 1, stage.config.hidden_size))
        dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=ranks.pp_group)
        stage.chunks[0].set_input_tensor(received)
    with torch.no_grad():
        hidden_T1H = stage.chunks[0](ids_T, rows)
    if not ranks.is_last_stage:
        dist.send(hidden_T1H, dst=parallel_state.get_pipeline_model_parallel_next_rank(), group=ranks.pp_group)
        return None
    local = float32_product(hidden_T1H[:, 0], stage.output_weight())
    parts = [torch.empty_like(local) for _ in range(ranks.tp_size)]
    dist.all_gather(parts, local, group=ranks.tp_group)
    return torch.cat(parts, dim=1)


def check_virtual_stages(folder: Path, member: str, megatron: MegatronSettings, ranks: Ranks):
    """Gives each pipeline rank two runs of layers. Both ways of loading fill them like the single stages above."""
    shape = read_shape(folder / member)
    model = ModelSettings(hf_path=str(folder / member), dtype="float32")
    stage = build_model(shape, model, replace(megatron, virtual_pipeline_model_parallel_size=2), ranks)
    number = shape.num_layers // (2 * ranks.pp_size)
    begins = [(virtual * ranks.pp_size + ranks.pp_rank) * number for virtual in range(2)]
    assert list(stage.layers) == [layer for begin in begins for layer in range(begin, begin + number)]
    load_stage(stage, folder / member, shape, ranks)
    read = {name: p.detach().clone() for name, p in stage.named_parameters()}
    for parameter in stage.parameters():
        parameter.data.zero_()
    loaded = dist_checkpointing.load({"model": stage.sharded_state_dict()}, str(folder / f"{member}-megatron"))
    stage.load_state_dict(loaded["model"])
    assert all(read[name].any() and torch.equal(p, read[name]) for name, p in stage.named_parameters()), member


def main() -> None:
    layout, folder, out = LAYOUTS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    megatron = MegatronSettings(**layout)
    ranks = start_ranks(megatron)
    for member in MEMBERS:
        shape = read_shape(folder / member)
        stage = build_model(shape, ModelSettings(hf_path=str(folder / member), dtype="float32"), megatron, ranks)
        load_stage(stage, folder / member, shape, ranks)
        read = {name: p.detach().clone() for name, p in stage.named_parameters()}
        stage.eval()  # Megatron trains experts under tensor parallelism with sequence parallelism alone
        found = logits(stage, ranks)
        speaks = ranks.is_last_stage and ranks.tp_rank == 0 and ranks.dp_rank == 0
        if speaks:
            torch.save(found, out / f"{member}.pt")
        for parameter in stage.parameters():
            parameter.data.zero_()
        load_weights(stage, folder / f"{member}-megatron", shape)
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, read[name]), (member, name)
        if ranks.pp_size > 1:
            check_virtual_stages(folder, member, megatron, ranks)
        saved = out / f"{member}-saved"
        if ranks.rank == 0:
            saved.mkdir()
        dist.barrier()
        dist_checkpointing.save({"model": stage.sharded_state_dict()}, str(saved))
        dist.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
