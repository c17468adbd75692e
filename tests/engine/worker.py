"""Builds stages with Transformer Engine's layers on a CPU, and compares them with plain layers: `MODELS OUT`.

Transformer Engine builds its layers on a CPU with real weights, and computes nothing there. Four things make this
possible: libraries are opened with lazy binding (some symbols of CUDA do not exist here and are never called); its
modules believe that there is CUDA while they are made; a GPU's properties are given; the package is told that the
engine can be used. One process imports everything and forks the ranks of each case.
"""

import os
import sys

sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)  # before torch is imported

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformer_engine.pytorch  # noqa: F401 - before Megatron, which imports a part of it
from safetensors.torch import load_file

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    Settings,
)
from megatron_paint.planning import hardware
from tests.engine.cases import CASES, Case
from tests.support.forks import end_after
from tests.support.ports import free_port

GPU = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=1 << 37, name="none")


def pretend_a_gpu() -> None:
    torch.cuda.get_device_properties = lambda *args, **kwargs: GPU
    torch.cuda.get_device_capability = lambda *args, **kwargs: (GPU.major, GPU.minor)
    hardware.missing_for_engine = lambda: None
    from megatron_paint.mcore.stage import Chunk

    init = Chunk.__init__

    def init_with_cuda(self, *args, **kwargs) -> None:
        with patch("torch.cuda.is_available", lambda: True):
            init(self, *args, **kwargs)

    Chunk.__init__ = init_with_cuda


def settings_of(case: Case, models: Path, *, engine: bool) -> Settings:
    fp8 = {"fp8": "hybrid", "fp8_recipe": case.fp8_recipe} if case.fp8_recipe and engine else {}
    return Settings(
        model=ModelSettings(
            hf_path=str(models / case.model),
            dtype="bfloat16",
            lora=LoraSettings(rank=4, alpha=8.0) if case.lora else None,
        ),
        data=DataSettings(train="unused"),
        run=RunSettings(dir="unused"),
        optimizer=OptimizerSettings(name="adam"),
        megatron=MegatronSettings(
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            expert_model_parallel_size=case.ep,
            sequence_parallel=case.tp > 1,
            transformer_impl="transformer_engine" if engine else "local",
            **fp8,
        ),
    )


def built(case: Case, models: Path, ranks, *, engine: bool):
    """A stage whose base weights are NaN until they are loaded, with adapters if the case has them."""
    from megatron_paint.mcore.hf_checkpoint import load_stage
    from megatron_paint.mcore.lora import add_adapters
    from megatron_paint.mcore.model import build_model
    from megatron_paint.models.qwen3.shape import read_shape

    settings = settings_of(case, models, engine=engine)
    shape = read_shape(settings.model.hf_path)
    stage = build_model(shape, settings.model, settings.megatron, ranks)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(torch.nan)
    load_stage(stage, settings.model.hf_path, shape, ranks)
    if case.lora:
        add_adapters(stage, settings.model.lora, shape, ranks, seed=1)
    return stage, settings, shape


def sharded(stage) -> dict[str, list]:
    """Key in a checkpoint -> global shape, this rank's shape and offset, replica, but the engine's own state."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_paint.mcore.checkpoint import _weights

    found = {}
    for entry in _weights(stage).values():
        parts = entry.build() if hasattr(entry, "build") else entry
        for part in (one for one in flat(parts) if isinstance(one, ShardedTensor)):
            place = [list(part.global_shape), list(part.local_shape), list(part.global_offset)]
            found.setdefault(part.key, []).append([*place, str(part.replica_id)])
    return {key: sorted(parts, key=str) for key, parts in sorted(found.items())}


def flat(parts) -> list:
    if isinstance(parts, dict):
        return [leaf for part in parts.values() for leaf in flat(part)]
    if isinstance(parts, list | tuple):
        return [leaf for part in parts for leaf in flat(part)]
    return [parts]


def marks(stage) -> dict[str, list]:
    """What Megatron reads from each parameter for reductions and norms, by the name that both kinds of layers share."""
    found = {}
    for name, parameter in stage.named_parameters():
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        if not has_experts(stage):
            name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        name = re.sub(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight", r"experts.\2.weight\1", name)
        is_split = bool(getattr(parameter, "tensor_model_parallel", False))
        found[name] = [
            is_split,
            getattr(parameter, "partition_dim", -1) if is_split else -1,
            bool(getattr(parameter, "sequence_parallel", False)),
            bool(getattr(parameter, "allreduce", True)),
            bool(parameter.requires_grad),
            list(parameter.shape),
        ]
    return found


def has_experts(stage) -> bool:
    return stage.config.num_moe_experts is not None


def unloaded(stage, shape, ranks) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of the model in memory, on every rank."""
    from megatron_paint.mcore.hf_checkpoint import base_parameters, gathered_tensors

    named = [(name, p.detach()) for name, p in base_parameters(stage)]
    mine = dict(gathered_tensors(named, shape, ranks))
    everyone = [None] * ranks.size
    dist.all_gather_object(everyone, mine, group=ranks.host_group)
    return {name: tensor for part in everyone for name, tensor in part.items()}


def loads(saving, loading, folder: Path, *, shape, ranks) -> list[str]:
    """Saves one stage and loads it into another; returns the Hugging Face tensors that differ then."""
    from megatron_paint.mcore.checkpoint import _weights, load_weights
    from megatron_paint.mcore.distributed_format import copy_distributed

    if ranks.rank == 0:
        folder.mkdir(parents=True)
    dist.barrier(group=ranks.host_group)
    copy_distributed({"model": _weights(saving)}, folder, ranks, named=folder)(ranks)
    dist.barrier(group=ranks.host_group)
    with torch.no_grad():
        for parameter in loading.parameters():
            parameter.fill_(torch.nan)
    load_weights(loading, folder, shape)
    theirs, ours = unloaded(saving, shape, ranks), unloaded(loading, shape, ranks)
    return sorted(name for name in theirs if not (name in ours and torch.equal(ours[name], theirs[name])))


def sampling_attention_differs() -> float:
    """How far attention of a call of sampling is from plain attention, in a model with context parallelism.

    Padding calls have no cache. They must not enter Transformer Engine's attention, which waits for other ranks.
    """
    from megatron_paint.mcore.attention import LocalAttention, token_rows, transformer_engine_attention

    config = SimpleNamespace(softmax_scale=None, context_parallel_size=2)
    generator, rows = torch.Generator().manual_seed(0), token_rows([], padding=4, device=torch.device("cpu"))
    parts = [torch.randn(4, 1, heads, 8, generator=generator) for heads in (4, 2, 2)]
    found = []
    for kind in (transformer_engine_attention(), LocalAttention):
        attention = kind.__new__(kind)
        torch.nn.Module.__init__(attention)
        attention.config, attention.layer_number = config, 1
        found.append(kind.forward(attention, *parts, packed_seq_params=rows))
    return float((found[0] - found[1]).abs().max())


def check(case: Case, models: Path, out: Path) -> dict:
    """What one rank finds out."""
    from megatron_paint.mcore.optimizer import make_optimizer, wrap_data_parallel
    from megatron_paint.mcore.ranks import start_ranks, stop_ranks
    from tests.engine.state import loads_the_usual_state, offloading, offloading_stage, saved_and_loaded

    ranks = start_ranks(settings_of(case, models, engine=False).megatron)
    stage, settings, shape = built(case, models, ranks, engine=True)
    plain, *_ = built(case, models, ranks, engine=False)
    layer = next(iter(stage.layers.values()))
    wrapped = wrap_data_parallel(stage, settings.megatron)
    optimizer = make_optimizer(wrapped, settings.optimizer, settings.megatron)
    wanted = load_file(Path(settings.model.hf_path) / "model.safetensors")
    found = unloaded(stage, shape, ranks)
    result = {
        "layers": {
            "linear_qkv": type(layer.self_attention.linear_qkv).__name__,
            "core_attention": type(layer.self_attention.core_attention).__name__,
            "q_layernorm": type(layer.self_attention.q_layernorm).__name__,
            "mlp": type(layer.mlp.experts if has_experts(stage) else layer.mlp.linear_fc1).__name__,
        },
        "fp8": str(getattr(stage.config, "fp8_recipe", None)) if stage.config.fp8 else None,
        "not_filled": [name for name, p in stage.named_parameters() if not p.isfinite().all()],
        "differs": sorted(
            name for name in wanted if not (name in found and torch.equal(found[name], wanted[name].bfloat16()))
        ),
        "sharded": sharded(stage),
        "sharded_of_plain": sharded(plain),
        "marks": marks(stage),
        "marks_of_plain": marks(plain),
        "optimizer": [type(part).__name__ for part in optimizer.chained_optimizers],
        "loaded": {
            name: loads(*pair, out / f"{case.name}-{name}", shape=shape, ranks=ranks)
            for name, pair in {"plain from engine": (stage, plain), "engine from plain": (plain, stage)}.items()
        }
        if case.crosses
        else {},
        "sampling_differs": sampling_attention_differs(),
        "has_buffers": all(hasattr(p, "main_grad") for p in stage.parameters() if p.requires_grad),
    }
    if case.saves_state:
        result["saved"] = saved_and_loaded(stage, settings, out / f"{case.name}-aware", ranks)
        result["from usual"] = loads_the_usual_state(stage, settings, out / f"{case.name}-usual", ranks)
    if case.pp == 1:
        result["offloading"] = offloading(shape, settings)
        result["offload context"] = offloading_stage(shape, settings, ranks)
    stop_ranks()
    return result


def rank_main(case: Case, models: Path, out: Path, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    (out / f"{case.name}-{rank}.json").write_text(json.dumps(check(case, models, out)))


def main() -> None:
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    pretend_a_gpu()
    import megatron_paint.mcore.policy  # noqa: F401 - once for all ranks

    for case in CASES:
        port, pids = free_port(), []
        for rank in range(case.processes):
            pid = os.fork()
            if pid == 0:
                end_after(partial(rank_main, case, models, out, rank, port))
            pids.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(statuses):
            print(f"case {case.name}: exit statuses {statuses}", file=sys.stderr)


if __name__ == "__main__":
    main()
