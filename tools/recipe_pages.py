"""The recipe page of each model size: from the presets in examples/, the estimate of memory and the planner's model."""

import re
from collections.abc import Callable, Iterable, Iterator

from megatron_paint.config.examples import objectives, preset_file, sizes
from megatron_paint.config.load import load_settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.memory import Plan, checkpoint_bytes, make_plan
from megatron_paint.planning.search.question import Asked, question_of
from megatron_paint.planning.search.search import search
from megatron_paint.planning.search.sizes import find_model, folder_of

GPU_MEMORY = 80e9
GPU = "h100-80"
GPUS_OF_A_NODE = 8
NODES = {"one node": 1, "two nodes": 2}
HEAD = re.compile(r"# (?P<model>Qwen3-\S+) with .* on (?P<nodes>one node|two nodes) of 8 GPUs with 80 GB each\.")
WHAT = {
    "paint": "PAINT",
    "opsd": "OPSD: shows the complete solution, mixes nothing",
    "support": "shows the complete solution; the target has only what the initial model finds plausible",
    "reference_free": "shows no solution to the teacher",
    "grpo": "GRPO: rewards instead of a teacher",
    "sft": "supervised fine-tuning on the solutions",
}
NOTE = """`python tools/make_docs.py` writes this page from the presets, the estimate of memory ([memory](../memory.md))
and the planner's model of time ([planner](../planner.md)). Do not edit it by hand. **Memory and times are estimates.
None was measured on a GPU.**
"""
INDEX = """# Recipes

A page for each model size: how to train it, what each preset needs, and which layout is the fastest on more GPUs.
[One node of 8 GPUs](../guides/one_node.md) and [Slurm](../guides/slurm.md) explain the commands.
"""
PRESETS = """Each trains {trains}. `optimizer.lr`, sampling and the rest are in their bases, such as
[paint](../../examples/qwen3_base/paint.yaml). `megatron-paint init` prints a preset with its base as one file. The host
memory is needed while a checkpoint is copied.
"""
ON_SLURM = "On Slurm ([guide](../guides/slurm.md)):\n"
MORE_GPUS = """The fastest layout of `paint` that fits on H100 GPUs with 80 GB, by the planner's model. A step of
{problems} problems is small for many GPUs, so more GPUs shorten it little. Raise `data.problems_per_step` too. This
command explains the first line and prints its settings:

```bash
{command}
```
"""
Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


def index_page(table: Table) -> str:
    """The text of docs/recipes/index.md: a line for each size."""
    rows = []
    for size in sizes():
        model, gpus = head_of(size)
        plan, shape = preset_plan(size, "paint", gpus=gpus), find_model(size)[1]
        cells = (f"[{model}]({size}.md)", f"{shape.num_parameters / 1e9:.2f}", str(gpus), layout_text(plan))
        rows.append((*cells, f"{plan.memory.peak / 1e9:.1f}"))
    head = ("model", "billion weights", "GPUs of 80 GB", "layout of the presets", "PAINT: GB a GPU")
    return f"{INDEX}\n{NOTE}\n{table(head, rows)}"


def recipe_page(size: str, table: Table) -> str:
    """The text of the page of a size such as qwen3_8b."""
    model, gpus = head_of(size)
    shape = find_model(size)[1]
    nodes = gpus // GPUS_OF_A_NODE
    experts = f", {shape.num_experts} experts a layer, {shape.experts_per_token} a token" if shape.num_experts else ""
    parts = [
        f"# {model}\n\n{NOTE}",
        f"{shape.num_parameters:,} weights, {shape.num_layers} layers, hidden size {shape.hidden_size}{experts}.\n"
        f"The presets are for {nodes} node{'s' * (nodes > 1)} of {GPUS_OF_A_NODE} GPUs with 80 GB.\n",
        f"## Train\n\n{_commands(size, model, nodes)}",
        f"## Presets\n\n{_presets(size, shape, gpus, table)}",
        f"## On more GPUs\n\n{_more_gpus(size, gpus, table)}",
    ]
    return "\n".join(parts)


def head_of(size: str) -> tuple[str, int]:
    """The name of the model and the number of GPUs that the first line of a size's preset names."""
    first = preset_file(size, "paint").read_text(encoding="utf-8").split("\n", 1)[0]
    found = HEAD.fullmatch(first)
    if found is None:
        raise ValueError(f"examples/{size}/paint.yaml begins with {first!r}, which names no model and no nodes")
    return found["model"], NODES[found["nodes"]] * GPUS_OF_A_NODE


def preset_plan(size: str, preset: str, *, gpus: int) -> Plan:
    """The layout and the estimate of a preset, on GPUs with 80 GB."""
    folder = folder_of(find_model(size)[1])
    settings = load_settings(preset_file(size, preset), [f"model.hf_path={folder}"])
    return make_plan(settings, processes=gpus, gpu_memory=GPU_MEMORY, ranks_per_node=GPUS_OF_A_NODE)


def layout_text(plan: Plan) -> str:
    """Such as "tensor 2 x data 4"."""
    sizes = {"tensor": plan.tensor_parallel, "pipeline": plan.pipeline_parallel, "data": plan.data_parallel}
    text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f"{text}, expert {plan.expert_parallel}" if plan.expert_parallel > 1 else text


def _commands(size: str, model: str, nodes: int) -> str:
    inputs = f"{size}.yaml model.hf_path=/models/{model} data.train=problems.jsonl"
    slurm = (
        f"megatron-paint launch slurm {inputs} \\\n    --nodes {nodes} --account team --partition gpu --time 24:00:00"
    )
    first = f"megatron-paint init {size} paint > {size}.yaml\n"
    train = f"megatron-paint train {inputs} --dry-run\nmegatron-paint train {inputs}\n"
    if nodes > 1:
        return f"{ON_SLURM}\n```bash\n{first}{slurm} --dry-run\n{slurm}\n```\n"
    return f"```bash\n{first}{train}```\n\n{ON_SLURM}\n```bash\n{slurm}\n```\n"


def _presets(size: str, shape: ModelShape, gpus: int, table: Table) -> str:
    rows, same = [], set()
    for name in objectives(size):
        plan = preset_plan(size, name, gpus=gpus)
        memory, lora = plan.memory, plan.settings.model.lora
        same.add(f"{'all weights' if lora is None else f'LoRA {lora.rank}'} on {gpus} GPUs: {layout_text(plan)}")
        link = f"[{name}](../../examples/{size}/{name}.yaml)"
        sampling = "-" if memory.sampling is None else _gb(memory.sampling.total)
        sizes = (_gb(memory.training.total), sampling, _gb(memory.host.node))
        rows.append((link, WHAT[name], *sizes, _gb(checkpoint_bytes(plan.settings, shape))))
    (trains,) = same  # a preset that differs needs a column
    head = ("preset", "objective", "GB a GPU, training", "sampling", "GB of host memory a node", "GB a checkpoint")
    return f"{PRESETS.format(trains=trains)}\n{table(head, rows)}"


def _more_gpus(size: str, gpus: int, table: Table) -> str:
    head = ("GPUs", "layout", "saves memory by", "s a step", "of these, sampling", "trained tokens/s a GPU", "GB a GPU")
    command = f"megatron-paint plan {size} --gpus {gpus} --gpu {GPU} --config examples/{size}/paint.yaml"
    problems = load_settings(preset_file(size, "paint")).data.problems_per_step
    text = MORE_GPUS.format(command=command, problems=problems)
    return f"{text}\n{table(head, _fastest(size, gpus))}"


def _fastest(size: str, gpus: int) -> Iterator[tuple[str, ...]]:
    for count in (gpus, 2 * gpus, 4 * gpus):
        config = preset_file(size, "paint")
        question = question_of(Asked(model=size, gpus=count, gpu=GPU, config=config))
        best = search(question, top=1).ranked[0]
        speed = question.work.trained_tokens / best.time.total / count
        times = (f"{best.time.total:.1f}", f"{best.time.rollout:.1f}", f"{speed:,.0f}")
        yield str(count), best.candidate.layout_text(), best.candidate.savings_text(), *times, _gb(best.peak)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
