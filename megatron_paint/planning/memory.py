"""The plan of a training run: its layout, the derived numbers, and an estimate of the memory per rank."""

from dataclasses import dataclass

from megatron_paint.config.settings import Settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.layout import WIDTHS, Layout, cache_bytes_per_token, check_layout

# Bytes of activations that backward needs, per token, layer and hidden unit, in 2-byte types without recomputation:
# the sum over norms, projections and SwiGLU of a layer with flash attention. Our estimate.
ACTIVATION_BYTES = 40
FLOAT32 = 4
OPTIMIZER_BYTES = 12  # per weight: float32 main weight and Adam's two moments
IN_FLIGHT = 2  # with several stages, a stage has the activations of at least so many micro-batches


@dataclass(frozen=True, kw_only=True)
class Plan(Layout):
    """A layout with the derived numbers of a run. Sizes are in bytes on the rank that needs most."""

    kernel: str  # implementation of the loss's elementwise work
    why_torch: str  # why Triton cannot be used; empty if it can
    memory: dict[str, float]
    saved: float  # host memory while a rank copies its part of a checkpoint

    def lines(self, settings: Settings) -> list[str]:
        """The plan as lines for the console."""
        shape = self.shape
        problems = settings.data.problems_per_step
        layers = shape.num_layers // self.pipeline_parallel
        rows = [
            f"model      {shape.num_parameters:,} weights, {shape.num_layers} layers, hidden {shape.hidden_size}, "
            f"{shape.num_heads} heads / {shape.num_groups} groups, vocabulary {shape.vocab_size:,}"
            f"{', tied' if shape.tied else ''}",
            f"layout     {self.processes} processes = tensor {self.tensor_parallel} x pipeline "
            f"{self.pipeline_parallel} x data {self.data_parallel}; {layers} layers "
            f"a stage, {shape.vocab_rows(self.tensor_parallel):,} vocabulary rows a rank",
            f"layers     {'Transformer Engine' if self.uses_engine else 'plain torch'}, {settings.model.dtype}"
            f"{f', FP8 {settings.megatron.fp8} {settings.megatron.fp8_recipe}' if settings.megatron.fp8 else ''}",
            f"loss       elementwise work by {self.kernel}"
            f"{f' ({self.why_torch})' if self.kernel == 'torch' and self.why_torch else ''}, chunks of "
            f"{_size(settings.objective.chunk_bytes)}",
            f"step       {problems} problems, about {problems / self.data_parallel:g} a replica, micro-batches of at "
            f"most {settings.data.micro_batch_tokens:,} tokens; {settings.run.steps} steps",
        ]
        total = sum(self.memory.values())
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.memory.items() if size)
        saving = f"a save takes about {_size(self.saved)} of host memory"
        return [*rows, f"memory     about {_size(total)} a rank (estimate): {parts}; {saving}"]


def make_plan(settings: Settings, *, processes: int) -> Plan:
    """The plan of a training run. UserError names the setting that does not fit, and the nearest valid value."""
    layout = check_layout(settings.model, settings.megatron, settings.rollout, processes=processes)
    shape, tp, pp, dp = layout.shape, layout.tensor_parallel, layout.pipeline_parallel, layout.data_parallel
    # Imports torch, which a mistake in the settings must not wait for.
    from megatron_paint.losses.elementwise.choose import loss_kernel, missing_for_triton

    return Plan(
        **vars(layout),
        kernel=loss_kernel(settings.objective.kernel),
        why_torch=missing_for_triton() or "",
        memory=_memory(settings, shape, tp=tp, pp=pp, dp=dp),
        saved=_saved(settings, shape) / (tp * pp),  # the first replica writes for all
    )


def _cache(settings: Settings, shape: ModelShape) -> float:
    """The most bytes of keys and values. A batch is cut so that they stay within rollout.cache_bytes."""
    longest = settings.rollout.max_new_tokens
    if settings.evaluation.problems is not None:
        longest = max(longest, settings.evaluation.longest_answer)
    tokens = settings.rollout.batch_size * min(shape.max_positions, 2 * longest)
    return min(float(settings.rollout.cache_bytes), _cache_bytes_per_token(settings, shape) * tokens)


def _cache_bytes_per_token(settings: Settings, shape: ModelShape) -> int:
    return cache_bytes_per_token(shape, dtype=settings.model.dtype, megatron=settings.megatron)


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Number of weights of LoRA adapters on all seven projections of every layer."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    ends = 2 * (shape.hidden_size + q) + 2 * (shape.hidden_size + kv) + 3 * (shape.hidden_size + shape.ffn_size)
    return rank * ends * shape.num_layers


def teacher_bytes(settings: Settings) -> int:
    """Bytes that the teacher stores for each trained weight; 0 if it shares the weights."""
    teacher, width = settings.objective.teacher, WIDTHS[settings.model.dtype]
    if not settings.objective.needs.teacher:
        return 0
    if teacher.weights == "ema":
        return FLOAT32 + (width if teacher.ema_anchor > 0 else 0)  # and the initial weights, its anchor
    has_copy = settings.model.lora is None or settings.model.adapter_path is not None
    return width if teacher.weights == "initial" and has_copy else 0


def checkpoint_bytes(settings: Settings, shape: ModelShape) -> int:
    """Estimated bytes of one checkpoint: weights, the optimiser's float32 state, and the teacher's own weights."""
    trained = _trained(settings, shape)
    weights = shape.num_parameters + (trained if settings.model.lora is not None else 0)
    return weights * WIDTHS[settings.model.dtype] + trained * (OPTIMIZER_BYTES + teacher_bytes(settings))


def _saved(settings: Settings, shape: ModelShape) -> float:
    """Bytes of a checkpoint, with a sharded optimiser state counted twice: Megatron gathers it in host memory."""
    gathered = OPTIMIZER_BYTES * _trained(settings, shape) if settings.megatron.use_distributed_optimizer else 0
    return checkpoint_bytes(settings, shape) + gathered


def _trained(settings: Settings, shape: ModelShape) -> int:
    lora = settings.model.lora
    return shape.num_parameters if lora is None else adapter_parameters(shape, lora.rank)


def _memory(settings: Settings, shape: ModelShape, *, tp: int, pp: int, dp: int) -> dict[str, float]:
    """Bytes per rank that are in memory at the same time, for the last stage, which has a share of the embeddings."""
    width = WIDTHS[settings.model.dtype]
    embedding = shape.vocab_size * shape.hidden_size
    layers = shape.num_parameters - embedding * (1 if shape.tied else 2)
    weights = (layers / pp + embedding) / tp
    trained = weights
    if (lora := settings.model.lora) is not None:
        trained = adapter_parameters(shape, lora.rank) / pp / tp
    teacher, held = settings.objective.teacher, teacher_bytes(settings)
    resting = 0 if teacher.offload else held
    # For a pass, an average is copied in the student's type, and weights in host memory are copied to the device.
    passing = width if held and (teacher.offload or teacher.weights == "ema") else 0
    optimizer = OPTIMIZER_BYTES * trained / (dp if settings.megatron.use_distributed_optimizer else 1)
    tokens = settings.data.micro_batch_tokens / (tp if settings.megatron.sequence_parallel else 1)
    kept = 1 if settings.megatron.recompute_granularity == "full" else shape.num_layers / pp
    return {
        "weights": weights * width,
        "gradients": trained * FLOAT32,
        "optimiser": optimizer,
        "teacher": float(trained * (resting + passing)),
        # The loss's float32 sum, and the zeros that Megatron's hook gets.
        "output layer's gradient": 0.0 if lora else embedding / tp * (FLOAT32 + width),
        "activations": tokens * shape.hidden_size * ACTIVATION_BYTES * kept * width / 2 * min(pp, IN_FLIGHT),
        "logits": float(settings.objective.chunk_bytes),
        "key-value cache": _cache(settings, shape),
    }


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
