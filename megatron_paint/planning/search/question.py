"""From the options of `megatron-paint plan` to the question of the search."""

import copy
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import read_tree, settings_of
from megatron_paint.config.settings import Settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.search.machines import Machine, find_machine
from megatron_paint.planning.search.search import Question
from megatron_paint.planning.search.servers import sampled_by_servers, servers_of, with_addresses
from megatron_paint.planning.search.sizes import find_model, folder_of
from megatron_paint.planning.search.workload import Lengths, workload_of

# What a plan of GRPO without a settings file asks for: values of examples/qwen3_base/grpo.yaml. Its importance weights
# need vLLM's log-probabilities, which exist for them.
GRPO = {"temperature": 1.2, "top_p": 1.0, "top_k": 0}
FP8_FORMAT = {"mxfp8": "e4m3"}  # of the recipes; the others use hybrid


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options. None: what the settings file says, or else the default."""

    model: str
    gpus: int
    gpu: str
    config: Path | None = None
    objective: str | None = None
    problems_per_step: int | None = None
    samples_per_problem: int | None = None
    max_new_tokens: int | None = None
    response_tokens: float | None = None
    prompt_tokens: int = 200
    solution_tokens: int = 500
    micro_batch_tokens: int | None = None
    batch_size: int | None = None
    lora: int | None = None
    fp8: str | None = None
    engine: str | None = None
    sampling_gpus: int | None = None
    reserve: float = 0.08
    no_offload: bool = False


def question_of(asked: Asked) -> Question:
    """Checks the options. UserError names the option and its value."""
    _check_numbers(asked)
    name, shape = find_model(asked.model)
    machine = find_machine(asked.gpu, gpus=asked.gpus)
    if asked.fp8 is not None and machine.gpu.fp8 is None:
        raise UserError(f"--fp8={asked.fp8}: {machine.name} has no FP8 (fp8: null); leave --fp8 out")
    tree = _tree(asked, name=name, folder=folder_of(shape))
    settings = settings_of(tree)
    if settings.megatron.fp8 is not None:
        _check_fp8(asked, settings, machine)
    if asked.no_offload and settings.megatron.optimizer_cpu_offload:
        raise UserError(
            f"--no-offload keeps the optimiser on the GPUs, and {asked.config} has megatron.optimizer_cpu_offload="
            "true: leave one of them out"
        )
    sampling_gpus = asked.sampling_gpus or machine.gpu.gpus_per_node
    if sampled_by_servers(settings):
        _, count = servers_of(shape, machine.gpu, gpus=sampling_gpus)
        tree = with_addresses(tree, count=count)
        settings = settings_of(tree)
    if settings.model.dtype != "bfloat16":
        raise UserError(f"model.dtype={settings.model.dtype}: the model of time is for bfloat16; set it to bfloat16")
    lengths = Lengths(prompt=asked.prompt_tokens, solution=asked.solution_tokens, response=asked.response_tokens)
    _check_lengths(settings, shape, lengths, name=name)
    return Question(
        tree=tree,
        settings=settings,
        shape=shape,
        machine=machine,
        lengths=lengths,
        reserve=asked.reserve,
        sampling_gpus=sampling_gpus,
        offload=not asked.no_offload,
    )


def _check_fp8(asked: Asked, settings: Settings, machine: Machine) -> None:
    """UserError: the GPUs cannot compute the FP8 of the settings."""
    if machine.gpu.fp8 is None:
        raise UserError(f"megatron.fp8={settings.megatron.fp8}: {machine.name} has no FP8 (fp8: null); set it to null")
    if settings.megatron.fp8_recipe == "mxfp8" and not machine.gpu.mxfp8:
        given = "--fp8=mxfp8" if asked.fp8 is not None else "megatron.fp8_recipe=mxfp8"
        raise UserError(
            f"{given}: {machine.name} has no MXFP8 (mxfp8: false), which needs compute capability 10.0 or higher; give "
            "--fp8 blockwise"
        )


def _check_numbers(asked: Asked) -> None:
    for name in ("prompt_tokens", "solution_tokens", "sampling_gpus", "response_tokens"):
        value = getattr(asked, name)
        if value is not None and not 1 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}={value}: give a number from 1")
    if not 0 <= asked.reserve < 1:
        raise UserError(f"--reserve={asked.reserve}: give a fraction of a GPU's memory from 0 and below 1")


def _check_lengths(settings: Settings, shape: ModelShape, lengths: Lengths, *, name: str) -> None:
    """UserError: the mean of the responses is above their limit, or a sequence has more tokens than positions exist."""
    work = workload_of(settings, lengths)
    if lengths.response is not None and not work.new_tokens:
        raise UserError(
            f"--response-tokens={lengths.response:g}: objective.name={settings.objective.name} samples no responses; "
            "give --solution-tokens"
        )
    if lengths.response is not None and lengths.response > work.new_tokens:
        raise UserError(
            f"--response-tokens={lengths.response:g} is above rollout.max_new_tokens={work.new_tokens}: lower it, or "
            "raise --max-new-tokens"
        )
    limit, limited_by = shape.max_positions, f"{name} has {shape.max_positions:,}"
    if (chosen := settings.data.max_tokens) is not None and chosen < limit:
        limit, limited_by = chosen, f"data.max_tokens is {chosen:,}"
    if work.longest > limit:
        prompt = int(work.longest_prompt)
        shown = "--prompt-tokens and --solution-tokens" if prompt > lengths.prompt else "--prompt-tokens"
        sampled, given = f"rollout.max_new_tokens={work.new_tokens}", f"--solution-tokens={lengths.solution}"
        raise UserError(
            f"a prompt of {prompt:,} tokens ({shown}) and {sampled if work.new_tokens else given} need "
            f"{int(work.longest):,} positions, and {limited_by}: lower one of them"
        )


def _tree(asked: Asked, *, name: str, folder: str) -> dict[str, Any]:
    """The settings as nested dictionaries: those of the file, and the options over them."""
    objective = asked.objective or "paint"
    if asked.config is not None:
        tree = copy.deepcopy(read_tree(asked.config))
    else:
        tree = {
            "model": {"hf_path": name},
            "data": {"train": "problems.jsonl"},
            "objective": {"name": objective},
            "run": {"dir": f"runs/{name}/{objective}"},
        }
        if objective == "grpo":
            tree["rollout"] = dict(GRPO)
    options = {
        "objective.name": asked.objective,
        "data.problems_per_step": asked.problems_per_step,
        "data.micro_batch_tokens": asked.micro_batch_tokens,
        "rollout.samples_per_problem": asked.samples_per_problem,
        "rollout.max_new_tokens": asked.max_new_tokens,
        "rollout.batch_size": asked.batch_size,
        "rollout.engine": asked.engine,
        "model.lora": {**_given_lora(tree), "rank": asked.lora, "alpha": 2 * asked.lora} if asked.lora else None,
        "megatron.fp8": None if asked.fp8 is None else FP8_FORMAT.get(asked.fp8, "hybrid"),
        "megatron.fp8_recipe": asked.fp8,
        "model.hf_path": folder,
    }
    for key, value in options.items():
        if value is not None:
            section, setting = key.split(".")
            tree[section] = {**(tree.get(section) or {}), setting: value}
    if asked.lora == 0:
        tree["model"]["lora"] = None
    return tree


def _given_lora(tree: dict[str, Any]) -> dict[str, Any]:
    return (tree.get("model") or {}).get("lora") or {}


def with_changes(question: Question, **changes: Any) -> Question:
    """The same question with other fields, or with other settings: `model_lora={...}` sets model.lora."""
    fields = {field.name for field in dataclasses.fields(Question)}
    tree = copy.deepcopy(dict(question.tree))
    for key, value in changes.items():
        if key not in fields:
            section, setting = key.split("_", 1)
            tree[section] = {**(tree.get(section) or {}), setting: value}
    kept = {key: value for key, value in changes.items() if key in fields}
    return dataclasses.replace(question, tree=tree, settings=settings_of(tree), **kept)


def relative(path: Path, *, to: Path | None) -> str:
    """The path of a settings file for the key `base` of a file in the folder of `to`."""
    return str(path) if to is None else os.path.relpath(path, to.resolve().parent)
