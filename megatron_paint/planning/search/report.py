"""The result of a search: as text, as JSON, as a settings file and as the command for Slurm."""

import io
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.load import read_tree
from megatron_paint.planning.memory import size_text
from megatron_paint.planning.search.as_settings import (
    DIMENSIONS,
    complete_estimate,
    searched_dimensions,
    settings_for,
    tree_for,
)
from megatron_paint.planning.search.candidate import CONTEXT, CONTEXT_TOKENS, context_sizes
from megatron_paint.planning.search.question import relative
from megatron_paint.planning.search.search import Found, Planned, Question
from megatron_paint.planning.search.sizes import find_model, sizes_of
from megatron_paint.planning.stage_memory import micro_batch_tokens

WARNING = (
    "The times come from a model and were not measured. docs/planner.md has its formulas and compares it with "
    "published speeds. On a machine, layouts with close times may rank in another order."
)


def lines(question: Question, found: Found) -> Iterator[str]:
    """The result for the console."""
    yield from _head(question, found)
    yield ""
    yield from _table(found.ranked)
    yield ""
    yield from _best(question, found.ranked[0])
    yield from _dropped(question, found)
    yield WARNING


def _head(question: Question, found: Found) -> Iterator[str]:
    shape, machine, settings = question.shape, question.machine, question.settings
    work, node = question.work, machine.gpus_on_node
    experts = (
        f", {count_text(shape.num_experts, 'expert')}, {shape.experts_per_token} a token" if shape.num_experts else ""
    )
    yield (
        f"model      {question.name}: {count_text(shape.num_parameters, 'weight')}, "
        f"{count_text(shape.num_layers, 'layer')}, hidden {shape.hidden_size}{experts}"
    )
    yield (
        f"machine    {machine.gpus} x {machine.name} on {count_text(machine.nodes, 'node')} of {node}; "
        f"{size_text(machine.gpu.memory)} a GPU, {size_text(question.usable)} may be used"
    )
    trained = "all weights" if settings.model.lora is None else f"LoRA {settings.model.lora.rank}"
    what = (
        f"responses of {work.response:g} tokens (at most {work.new_tokens})"
        if work.new_tokens
        else (f"solutions of {work.response:g} tokens")
    )
    fp8 = f", FP8 {settings.megatron.fp8_recipe}" if settings.megatron.fp8 else ""
    yield (
        f"step       {settings.objective.name}, {trained}, bfloat16{fp8}; {work.sequences} {what}, prompts of "
        f"{work.prompt:g}{f', of the teacher {work.teacher_prompt:g}' if work.teacher_passes else ''}; micro-batches "
        f"of at most {count_text(settings.data.micro_batch_tokens, 'token')}"
    )
    tokens = micro_batch_tokens(settings, shape)
    if tokens > settings.data.micro_batch_tokens:
        fills = "the model's positions" if settings.data.max_tokens is None else "data.max_tokens"
        longest = "a response" if work.new_tokens else f"a solution that fills {fills}"
        yield f"           {longest} is a micro-batch alone: memory counts {count_text(tokens, 'token')}"
    if work.new_tokens:
        servers = (
            f" servers on {count_text(question.sampling_gpus, 'GPU')} of their own"
            if settings.rollout.engine == "vllm"
            else ""
        )
        yield f"sampling   {settings.rollout.engine}{servers}"
    if settings.megatron.cpu_offloading:
        yield "offloaded  megatron.cpu_offloading: its memory counts, the time of its copies does not"
    yield f"searched   {count_text(found.layouts, 'layout')}: {searched_text(question)}"
    left_out = not_searched_text(question)
    if left_out:
        yield f"           not searched: {left_out}"


def searched_text(question: Question) -> str:
    """The dimensions that were searched."""
    names = [dimension.title for dimension in searched_dimensions(question.shape)]
    moved = ["the teacher's weights"] * question.offloads["teacher"]
    moved += ["the optimiser's state"] * question.offloads["optimizer"]
    places = f", and {' and '.join(moved)} on the GPU or the host" if moved else ""
    return f"{', '.join(names)} and data parallel; each with recomputation none, selective, full{places}"


def not_searched_text(question: Question) -> str:
    """The dimensions that were not searched, and why."""
    missing = [dimension.title for dimension in DIMENSIONS if not dimension.exists]
    dense = [each.title for each in DIMENSIONS if each.exists and each.experts and not question.shape.num_experts]
    parts = [f"{', '.join(missing)} (this version has no such setting)"] if missing else []
    parts += [f"{', '.join(dense)} (the model has no experts)"] if dense else []
    if max(context_sizes(question.work.longest)) < max(CONTEXT):
        parts.append(f"context parallelism with less than {CONTEXT_TOKENS:,} tokens of the longest row on a rank")
    return "; ".join([*parts, "tensor-parallel groups over several nodes"])


def _table(ranked: Sequence[Planned]) -> Iterator[str]:
    head = ("", "layout", "saves memory by", "s a step", "rollout", "transfer", "teacher", "student", "optimiser", "GB")
    rows = [head]
    for number, planned in enumerate(ranked, 1):
        phases = planned.time.phases
        rows.append(
            (
                str(number),
                planned.candidate.layout_text(),
                planned.candidate.savings_text(),
                _seconds(planned.time.total),
                _seconds(planned.time.rollout),
                *(_seconds(phases[name].total) for name in head[5:9]),
                f"{planned.peak / 1e9:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in (1, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _best(question: Question, planned: Planned) -> Iterator[str]:
    settings = settings_for(question.settings, planned.candidate, question.shape)
    machine = question.machine
    host = complete_estimate(settings, question.shape, gpus=machine.gpus, ranks_per_node=machine.gpus_on_node).host
    speed = question.work.trained_tokens / planned.time.total / machine.gpus
    text = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
    yield f"time       of 1, {text} trained tokens/s a GPU:"
    for phase, seconds in planned.time.phases.items():
        kinds = {name: value / seconds.total for name, value in seconds.parts().items() if value > 0}
        if kinds:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in kinds.items())
            yield f"           {phase:9} {_seconds(seconds.total):>5} s: {shares}"
    memory = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in planned.memory.items())
    yield (
        f"memory     of 1, GB a GPU: {memory}; host, while a checkpoint is copied: {size_text(host.node)} on a node of "
        f"{count_text(host.ranks, 'rank')}"
    )


def _dropped(question: Question, found: Found) -> Iterator[str]:
    reasons = []
    for messages in _similar(found.refused):
        (message, _), *others = messages.most_common()
        similar = f" (and {count_text(len(others), 'similar reason')}, in --json)" if others else ""
        reasons.append(f"{count_text(messages.total(), 'layout')}: {question.shown(message)}{similar}")
    if found.too_large:
        usable = size_text(question.usable)
        tried = "any recomputation and offload" if question.offload else "any recomputation"
        reasons.append(f"{count_text(found.too_large, 'layout')}: more than {usable}, with {tried}")
    if found.slower:
        reasons.append(
            f"{count_text(found.slower, 'layout')}: after those above in this order; their memory was not estimated"
        )
    for number, reason in enumerate(reasons):
        yield f"{'left out' if number == 0 else '':10} {reason}"


def _similar(refused: Counter[str]) -> list[Counter[str]]:
    """Messages in groups, the largest first: those of a group begin with the same setting."""
    groups: dict[str, Counter[str]] = {}
    for message, count in refused.items():
        groups.setdefault(message.partition("=")[0], Counter())[message] = count
    return sorted(groups.values(), key=lambda messages: -messages.total())


def settings_text(question: Question, planned: Planned, *, config: Path | None, file: Path | None, name: str) -> str:
    """The settings file of a layout: over the file that was given, or complete."""
    tree = tree_for(question.tree, planned.candidate, question.shape)
    if config is None:
        tree["model"] = {**tree["model"], "hf_path": name}
        head = "# model.hf_path: folder of the checkpoint; data.train: the problems\n"
    else:
        changed = {"megatron": tree["megatron"]}
        for section in ("model", "data", "rollout"):
            values = {key: value for key, value in tree.get(section, {}).items() if key in OPTIONS[section]}
            changed |= {section: values} if values else {}
        if _is_another_model(question, config, name=name):
            changed["model"] = {"hf_path": name, **changed.get("model", {})}
        objective: dict[str, Any] = {"name": question.settings.objective.name}
        if "offload" in ((tree.get("objective") or {}).get("teacher") or {}):
            objective["teacher"] = {"offload": planned.candidate.teacher_offload}
        tree, head = {"base": relative(config, to=file), "objective": objective, **changed}, ""
    out = io.StringIO()
    writer = YAML()
    writer.default_flow_style = False
    writer.dump(tree, out)
    return head + out.getvalue()


def _is_another_model(question: Question, config: Path, *, name: str) -> bool:
    """Whether MODEL replaces the model of a settings file.

    A folder does. The name of a size does if the file names a model of other sizes. A path that this machine does not
    see stays.
    """
    if Path(name).is_dir():
        return True
    given = (read_tree(config).get("model") or {}).get("hf_path")
    try:
        return given is None or sizes_of(find_model(given)[1]) != sizes_of(question.shape)
    except UserError:
        return False


OPTIONS = {  # settings that an option of the command may have changed
    "model": ("lora",),
    "data": ("problems_per_step", "micro_batch_tokens"),
    "rollout": ("samples_per_problem", "max_new_tokens", "batch_size", "engine", "vllm"),
}


def slurm_command(question: Question, *, settings_file: str, hf_path: str | None) -> str:
    """The command that submits the run. hf_path: None if the settings name the model and the data."""
    machine = question.machine
    words = ["megatron-paint", "launch", "slurm", settings_file]
    words += [f"model.hf_path={hf_path}", "data.train=problems.jsonl"] if hf_path is not None else []
    words += ["--nodes", str(machine.nodes), "--gpus-per-node", str(machine.gpus_on_node)]
    words += ["--gpu-memory", f"{machine.gpu.memory / 1e9:g}GB"]
    words += ["--account", "ACCOUNT", "--partition", "PARTITION", "--time", "24:00:00"]
    return shlex.join(words)


def as_json(question: Question, found: Found) -> Mapping[str, Any]:
    """The result as JSON: seconds and bytes."""
    ranked = [
        {
            "layout": vars(planned.candidate),
            "megatron": tree_for(question.tree, planned.candidate, question.shape)["megatron"],
            "seconds": planned.time.total,
            "phases": {name: part.parts() for name, part in planned.time.phases.items()},
            "bytes": dict(planned.memory),
        }
        for planned in found.ranked
    ]
    return {
        "model": question.shape.source,
        "gpu": question.machine.name,
        "gpus": question.machine.gpus,
        "usable_bytes": question.usable,
        "searched": [dimension.name for dimension in searched_dimensions(question.shape)],
        "layouts": found.layouts,
        "refused": dict(found.refused.most_common()),
        "too_large": found.too_large,
        "slower": found.slower,
        "ranked": ranked,
    }


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
