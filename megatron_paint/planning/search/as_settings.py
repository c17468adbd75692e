"""From a candidate to settings: the one place where the search meets them.

The settings' own checks refuse layouts, and the settings' own estimate counts memory. A dimension that the settings do
not have is not searched: which ones exist is read from the settings' class.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.offload import STATE_TYPES
from megatron_paint.config.settings import Settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.estimate import MemoryEstimate, estimate
from megatron_paint.planning.hardware import asks_transformer_engine
from megatron_paint.planning.layout import Layout, check_shape, layout_of, trainer_samples
from megatron_paint.planning.search.candidate import Candidate
from megatron_paint.planning.stage_memory import StageMemory, teacher_bytes

FIELDS = {field.name: field for field in dataclasses.fields(MegatronSettings)}


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A number of a candidate and the settings that set it."""

    name: str  # in Candidate
    title: str
    settings: tuple[str, ...]  # in the section megatron; all of them must exist
    experts: bool = False  # only mixtures of experts have it
    always: bool = False  # it is set even where it is 1

    @property
    def exists(self) -> bool:
        """Whether this version has its settings."""
        return all(name in FIELDS for name in self.settings)


DIMENSIONS = (
    Dimension(name="tp", title="tensor", settings=("tensor_model_parallel_size",), always=True),
    Dimension(name="pp", title="pipeline", settings=("pipeline_model_parallel_size",), always=True),
    Dimension(name="vpp", title="virtual pipeline", settings=("virtual_pipeline_model_parallel_size",)),
    Dimension(
        name="balanced",
        title="stages that count their ends",
        settings=("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    ),
    Dimension(name="cp", title="context", settings=("context_parallel_size",)),
    Dimension(name="ep", title="expert", settings=("expert_model_parallel_size",), experts=True),
    # Megatron takes the tensor-parallel size where it is not set.
    Dimension(name="etp", title="expert tensor", settings=("expert_tensor_parallel_size",), experts=True, always=True),
)
RECOMPUTE: Mapping[str, dict[str, Any]] = {
    "none": {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
    "selective": {"recompute_granularity": "selective", "recompute_method": None, "recompute_num_layers": None},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
OFFLOADED_OPTIMIZER = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
# Rules for the layers of stages that no candidate has. A settings file's layout is replaced.
NOT_SEARCHED = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)
PHASES = {  # moments of the estimate, by phase of a step
    "rollouts": "sampling",
    "evaluation": "sampling",
    "teacher's pass": "teacher",
    "backward pass": "student",
    "loss": "loss",
    "optimiser step": "optimiser",
}


def searched_dimensions(shape: ModelShape) -> tuple[Dimension, ...]:
    """The dimensions that the settings have and this model can use. Data parallelism is what is left of the ranks."""
    return tuple(each for each in DIMENSIONS if each.exists and (shape.num_experts or not each.experts))


def megatron_changes(candidate: Candidate, shape: ModelShape) -> dict[str, Any]:
    """Values of the section megatron that make a candidate. Dimensions that it does not use have their defaults."""
    changes: dict[str, Any] = {}
    for dimension in DIMENSIONS:
        value = getattr(candidate, dimension.name)
        used = dimension.always or value is True or value > 1
        if dimension.exists:
            fits = used and (shape.num_experts or not dimension.experts)
            changes |= {name: value if fits else FIELDS[name].default for name in dimension.settings}
    changes |= {name: FIELDS[name].default for name in NOT_SEARCHED if name in FIELDS}
    changes |= OFFLOADED_OPTIMIZER if candidate.optimizer_offload else {}
    return {**changes, "sequence_parallel": candidate.tp > 1, **RECOMPUTE[candidate.recompute]}


def settings_for(base: Settings, candidate: Candidate, shape: ModelShape) -> Settings:
    """The settings with the layout of a candidate. They are not checked."""
    megatron = dataclasses.replace(base.megatron, **megatron_changes(candidate, shape))
    teacher = base.objective.teacher
    if candidate.teacher_offload == teacher.offload:
        return dataclasses.replace(base, megatron=megatron)
    objective = dataclasses.replace(
        base.objective, teacher=dataclasses.replace(teacher, offload=candidate.teacher_offload)
    )
    return dataclasses.replace(base, megatron=megatron, objective=objective)


def tree_for(tree: Mapping[str, Any], candidate: Candidate, shape: ModelShape) -> dict[str, Any]:
    """The same as nested dictionaries, without defaults that `tree` does not change.

    tree: the settings as nested dictionaries, with or without a layout.
    """
    found = copy.deepcopy(dict(tree))
    given = found.get("megatron") or {}
    shown = {"tensor_model_parallel_size", "pipeline_model_parallel_size", *given}
    changes = megatron_changes(candidate, shape)
    changed = {name: value for name, value in changes.items() if name in shown or value != FIELDS[name].default}
    found["megatron"] = {**changed, **{name: value for name, value in given.items() if name not in changes}}
    teacher = (found.get("objective") or {}).get("teacher") or {}
    if candidate.teacher_offload or "offload" in teacher:
        found["objective"] = {
            **(found.get("objective") or {}),
            "teacher": {**teacher, "offload": candidate.teacher_offload},
        }
    return found


def refusal(settings: Settings, shape: ModelShape, *, gpus: int) -> str | None:
    """Why the checks of a run refuse the layout of these settings; None if they do not."""
    try:
        samples = trainer_samples(settings)
        check_shape(shape, settings.model, settings.megatron, settings.rollout, samples=samples)
        _layout(settings, shape, gpus=gpus)
    except UserError as error:
        return str(error)
    return None


def refusal_of_tree(tree: Mapping[str, Any]) -> str | None:
    """Why the settings of a file are refused, contradictions included; None if they are not."""
    try:
        settings_of(tree)
    except UserError as error:
        return str(error)
    return None


def can_offload_teacher(settings: Settings) -> bool:
    """Whether the teacher keeps a separate copy of weights. `teacher.offload` keeps such a copy in host memory."""
    return teacher_bytes(settings) > 0


def can_offload_optimizer(settings: Settings) -> bool:
    """Whether the search may move the optimiser to host memory: the settings allow it, and do not do it already.

    With adapters its state is too small to matter. Moments in bfloat16 stay on the GPU.
    """
    megatron, model = settings.megatron, settings.model
    if megatron.optimizer_cpu_offload or model.lora is not None:
        return False
    if any(getattr(megatron, name) != "fp32" for name in STATE_TYPES):
        return False
    return megatron.use_distributed_optimizer and settings.optimizer.name == "adam" and model.dtype == "bfloat16"


def phase_bytes(settings: Settings, shape: ModelShape, *, gpus: int) -> dict[str, float]:
    """Bytes on the GPU of the rank that needs most, in each phase of a step.

    Of a pipeline the first two stages and the last one are asked: the stages between have no more layers than the
    second one, and fewer micro-batches in flight.
    """
    layout = _layout(settings, shape, gpus=gpus)
    found: dict[str, float] = {}
    for stage in sorted({0, min(1, layout.pipeline_parallel - 1), layout.pipeline_parallel - 1}):
        memory = StageMemory(settings, layout, stage=stage, engine=layout.uses_engine, triton=True, on_gpus=True)
        for peak in (*memory.training(), *memory.sampling(), memory.resting()):
            phase = PHASES.get(peak.moment, peak.moment)
            found[phase] = max(found.get(phase, 0.0), peak.total)
    return {**found, "save": found["optimiser"]}


def complete_estimate(settings: Settings, shape: ModelShape, *, gpus: int, ranks_per_node: int) -> MemoryEstimate:
    """The estimate that `--dry-run` prints for these settings on nodes with GPUs."""
    layout = _layout(settings, shape, gpus=gpus)
    return estimate(
        settings, layout, engine=layout.uses_engine, triton=True, on_gpus=True, ranks_per_node=ranks_per_node
    )


def _layout(settings: Settings, shape: ModelShape, *, gpus: int) -> Layout:
    engine = asks_transformer_engine(settings.megatron)
    return layout_of(shape, settings.megatron, processes=gpus, uses_engine=engine)
