"""What a stage of Transformer Engine's layers does with the settings that save memory: imported by the worker alone."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.objective import TeacherSettings
from megatron_paint.config.settings import Settings
from megatron_paint.mcore.checkpoint import _begin_state, copy_checkpoint, load_checkpoint
from megatron_paint.mcore.model import build_model, transformer_config
from megatron_paint.mcore.optimizer import make_optimizer, wrap_data_parallel
from megatron_paint.mcore.teacher import Teacher

AWARE = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


def precise_optimizer(stage, settings: Settings):
    """A precision-aware optimiser of the stage with bfloat16 moments."""
    megatron = replace(settings.megatron, **AWARE)
    return make_optimizer(wrap_data_parallel(stage, megatron), settings.optimizer, megatron)


def value_of(parameter: torch.Tensor, number: int) -> torch.Tensor:
    """Numbers that differ from weight to weight, and are the same in every copy of a weight."""
    return (1000 * parameter.detach().float() + number).cos()


def fill(optimizer, *, number: int) -> None:
    """Sets main weights and moments; the count of steps becomes 7."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = 7
            for parameter in group["params"]:
                for place, name in enumerate(("exp_avg", "exp_avg_sq", "master_param")):
                    part.optimizer.set_scaled_state(parameter, name, value_of(parameter, number + place))


def values(optimizer) -> list[torch.Tensor]:
    return [
        part.optimizer.state[parameter][name].clone()
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for name in ("exp_avg", "exp_avg_sq", "master_param")
        if parameter.numel()
    ]


def saved_and_loaded(stage, settings: Settings, folder: Path, ranks) -> dict:
    """Whether each number of the optimiser's state comes back from a checkpoint, and its types."""
    optimizer, teacher = precise_optimizer(stage, settings), Teacher(stage, TeacherSettings(weights="current"))
    _begin_state(optimizer)
    steps = {group["step"] for part in optimizer.chained_optimizers for group in part.optimizer.param_groups}
    fill(optimizer, number=1)
    before = values(optimizer)
    copy_checkpoint(folder, stage, optimizer, teacher, {"step": 7}, ranks)(ranks)
    fill(optimizer, number=100)
    changed = [not torch.equal(*pair) for pair in zip(before, values(optimizer), strict=True)]
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = 1
    load_checkpoint(folder, stage, optimizer, teacher)
    parts = [part.optimizer for part in optimizer.chained_optimizers]
    state = next(iter(parts[0].state.values()))
    return {
        "class": sorted({type(part).__module__ for part in parts}),
        "began at": sorted(steps),
        "changed": all(changed),
        "comes back": all(torch.equal(*pair) for pair in zip(before, values(optimizer), strict=True)),
        "steps": sorted({group["step"] for part in parts for group in part.param_groups if group["params"]}),
        "types": {name: str(value.dtype) for name, value in state.items()},
        "left": sum(p.grad is not None for part in parts for group in part.param_groups for p in group["params"]),
    }


def loads_the_usual_state(stage, settings: Settings, folder: Path, ranks) -> bool:
    """Whether a precision-aware optimiser takes main weights and moments from a checkpoint of the usual one."""
    megatron = replace(settings.megatron, use_precision_aware_optimizer=True)
    teacher = Teacher(stage, TeacherSettings(weights="current"))
    usual = make_optimizer(wrap_data_parallel(stage, settings.megatron), settings.optimizer, settings.megatron)
    _begin_state_of_the_usual(usual)
    found = [
        [p.clone(), part.optimizer.state[p]["exp_avg"].clone(), part.optimizer.state[p]["exp_avg_sq"].clone()]
        for part in usual.chained_optimizers
        for group in part.optimizer.param_groups
        for p in group["params"]
        if p.numel()
    ]
    copy_checkpoint(folder, stage, usual, teacher, {"step": 7}, ranks)(ranks)
    aware = make_optimizer(wrap_data_parallel(stage, megatron), settings.optimizer, megatron)
    load_checkpoint(folder, stage, aware, teacher)
    loaded = [
        [part.optimizer.state[p][name] for name in ("master_param", "exp_avg", "exp_avg_sq")]
        for part in aware.chained_optimizers
        for group in part.optimizer.param_groups
        for p in group["params"]
        if p.numel()
    ]
    pairs = zip(found, loaded, strict=True)
    return all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def _begin_state_of_the_usual(optimizer) -> None:
    """Without a step: Transformer Engine's Adam computes nothing on a CPU."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group["step"] = 7
            for parameter in group["params"]:
                parameter.data.copy_(value_of(parameter, 1))
                for place, name in enumerate(("exp_avg", "exp_avg_sq")):
                    part.optimizer.set_scaled_state(parameter, name, value_of(parameter, 2 + place))


def offloading(shape, settings: Settings) -> dict:
    """What reaches Megatron's description of the model."""
    megatron: MegatronSettings = replace(settings.megatron, cpu_offloading=True, cpu_offloading_num_layers=1)
    config = transformer_config(shape, settings.model, megatron)
    return {name: getattr(config, name) for name in ("cpu_offloading", "cpu_offloading_num_layers")}


def offloading_stage(shape, settings: Settings, ranks) -> dict:
    """The context in which layers run, and whether it leaves gradients alone between passes without gradients."""
    megatron = replace(settings.megatron, cpu_offloading=True, cpu_offloading_num_layers=1)
    decoder = build_model(shape, settings.model, megatron, ranks).chunks[0].decoder
    context = type(decoder.offload_context)
    return {
        "context": f"{context.__module__}.{context.__name__}",
        "gradients": [torch.equal(*pair) for pair in zip(passes(decoder), passes(None), strict=True)],
    }


def passes(decoder) -> list[torch.Tensor]:
    """Gradients of two passes in their order in a step, as Megatron runs layers; decoder: None for no context.

    Before each come passes without gradients: samples, the teacher. The layers are torch's, which compute on a CPU.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 4) for _ in range(2)]

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            with nullcontext() if decoder is None else decoder.offload_context:
                hidden = layer(hidden).sin()
            if decoder is not None and torch.is_grad_enabled():
                hidden = decoder.group_prefetch_offload_commit_async(hidden)
        return hidden

    found = []
    for step in range(2):
        with torch.no_grad():
            for _ in range(1 + step):
                run(torch.ones(3, 4))
        for micro_batch in range(2):
            run(torch.full((3, 4), 1.0 + micro_batch)).square().sum().backward()
        found += [p.grad.clone() for layer in layers for p in layer.parameters()]
    return found
