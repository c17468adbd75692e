"""What a run will need, worked out before anything is loaded: the layout, the derived numbers, memory per rank."""

from dataclasses import dataclass
from pathlib import Path

from megatron_paint.base.errors import UserError, about
from megatron_paint.config.settings import MegatronSettings, Settings
from megatron_paint.losses.elementwise.choose import loss_kernel, missing_for_triton
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.apex import refuse_foreign_apex
from megatron_paint.planning.hardware import engine_environment, use_transformer_engine

# Bytes of activations a token and layer keep for backward, per hidden unit, in 2-byte types without recomputation:
# the sum over norms, projections and SwiGLU of a layer with flash attention; an estimate, ours.
ACTIVATION_BYTES = 40
WIDTHS = {"bfloat16": 2, "float32": 4}
FLOAT32 = 4
OPTIMIZER_BYTES = 12  # a weight: float32 main weight and Adam's two moments
IN_FLIGHT = 2  # micro-batches whose activations a stage holds at once, at least, where there are several stages


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Derived numbers of a run; sizes in bytes on the fullest rank."""

    shape: ModelShape
    processes: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    uses_engine: bool
    kernel: str  # who does the loss's elementwise work
    memory: dict[str, float]
    saved: float  # host memory while a rank copies its part of a checkpoint

    def lines(self, settings: Settings) -> list[str]:
        """The plan as a user reads it."""
        shape = self.shape
        problems = settings.data.problems_per_step
        layers = shape.num_layers // self.pipeline_parallel
        rows = [
            f"model      {shape.num_parameters:,} weights, {shape.num_layers} layers, hidden {shape.hidden_size}, "
            f"{shape.num_heads} heads / {shape.num_groups} groups, vocabulary {shape.vocab_size:,}"
            f"{', tied' if shape.tied else ''}",
            f"layout     {self.processes} processes = tensor {self.tensor_parallel} x pipeline "
            f"{self.pipeline_parallel} x data {self.data_parallel}; {layers} layers "
            f"a stage, {shape.vocab_size // self.tensor_parallel:,} vocabulary rows a rank",
            f"layers     {'Transformer Engine' if self.uses_engine else 'plain torch'}, {settings.model.dtype}"
            f"{f', FP8 {settings.megatron.fp8} {settings.megatron.fp8_recipe}' if settings.megatron.fp8 else ''}",
            f"loss       elementwise work by {self.kernel}"
            f"{f' ({missing_for_triton()})' if self.kernel == 'torch' and missing_for_triton() else ''}, chunks of "
            f"{_size(settings.objective.chunk_bytes)}",
            f"step       {problems} problems, about {problems / self.data_parallel:g} a replica, micro-batches of at "
            f"most {settings.data.micro_batch_tokens:,} tokens; {settings.run.steps} steps",
        ]
        total = sum(self.memory.values())
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.memory.items() if size)
        saving = f"a save takes about {_size(self.saved)} of host memory"
        return [*rows, f"memory     about {_size(total)} a rank (estimate): {parts}; {saving}"]


def make_plan(settings: Settings, *, processes: int) -> Plan:
    """Checks model, layout and machine against each other; UserError names the setting and the nearest valid value."""
    refuse_foreign_apex()
    with about("model.hf_path"):
        shape = read_shape(settings.model.hf_path)
    _refuse_experts(settings, shape)
    megatron = settings.megatron
    engine_environment(megatron)
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    for size, what in (
        (shape.num_heads, "attention heads"),
        (shape.num_groups, "key-value groups"),
        (shape.ffn_size, "feed-forward size"),
        (shape.vocab_size, "vocabulary size"),
    ):
        _must_divide("megatron.tensor_model_parallel_size", tp, size, what, shape)
    _must_divide("megatron.pipeline_model_parallel_size", pp, shape.num_layers, "number of layers", shape)
    dp = data_parallel_size(processes, megatron)
    if megatron.sequence_parallel and tp == 1:
        raise UserError(
            "megatron.sequence_parallel=true splits activations over tensor-parallel ranks, but "
            "tensor_model_parallel_size=1; set it to false"
        )
    if settings.rollout.max_new_tokens >= shape.max_positions:
        raise UserError(
            f"rollout.max_new_tokens={settings.rollout.max_new_tokens} leaves no room for a prompt: the model has "
            f"{shape.max_positions} positions"
        )
    _check_cache(settings, shape)
    start = settings.model.megatron_path
    if start is not None and not Path(start).is_dir():
        raise UserError(f"model.megatron_path: {start} is not a folder; give the folder of a Megatron checkpoint")
    return Plan(
        shape=shape,
        processes=processes,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=dp,
        uses_engine=use_transformer_engine(megatron),
        kernel=loss_kernel(settings.objective.kernel),
        memory=_memory(settings, shape, tp=tp, pp=pp, dp=dp),
        saved=_saved(settings, shape) / (tp * pp),  # the first replica writes for all
    )


def data_parallel_size(processes: int, megatron: MegatronSettings) -> int:
    """Replicas that `processes` processes hold; UserError where the layout does not fit."""
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    if processes % (tp * pp):
        multiple = max(1, round(processes / (tp * pp))) * tp * pp
        raise UserError(
            f"{processes} processes cannot be laid out as tensor_model_parallel_size={tp} x "
            f"pipeline_model_parallel_size={pp}: their number must be a multiple of {tp * pp} "
            f"(nearest: --processes {multiple})"
        )
    return processes // (tp * pp)


def _refuse_experts(settings: Settings, shape: ModelShape) -> None:
    if shape.num_experts:
        raise UserError(
            f"{shape.source} is a mixture of experts: its checkpoints can be converted (megatron-paint convert), but "
            "training one is not possible yet; give a dense model"
        )
    if settings.megatron.expert_model_parallel_size > 1:
        raise UserError(
            f"megatron.expert_model_parallel_size={settings.megatron.expert_model_parallel_size} shares experts, and "
            f"{shape.source} has none; set it to 1"
        )


def _must_divide(key: str, ranks: int, size: int, what: str, shape: ModelShape) -> None:
    if size % ranks:
        valid = [n for n in range(1, size + 1) if size % n == 0]
        nearest = min(valid, key=lambda n: (abs(n - ranks), n))
        raise UserError(
            f"{key}={ranks} does not divide the {what}, {size}, of {shape.source}; the nearest that does is {nearest}"
        )


def cache_bytes_per_token(settings: Settings, shape: ModelShape) -> int:
    """Bytes of keys and values that a rank keeps of one token while it samples."""
    megatron, width = settings.megatron, WIDTHS[settings.model.dtype]
    layers = shape.num_layers // megatron.pipeline_model_parallel_size
    return layers * 2 * shape.num_groups // megatron.tensor_model_parallel_size * shape.head_dim * width


def _check_cache(settings: Settings, shape: ModelShape) -> None:
    """Whether the longest response that can be asked for fits by itself."""
    needed = cache_bytes_per_token(settings, shape) * shape.max_positions
    if needed > settings.rollout.cache_bytes:
        raise UserError(
            f"rollout.cache_bytes={settings.rollout.cache_bytes:g} is less than the keys and values of one response of "
            f"{shape.max_positions:,} positions take on a rank: {needed:,}; raise it, or the tensor or pipeline "
            "parallel size"
        )


def _cache(settings: Settings, shape: ModelShape) -> float:
    """Bytes of keys and values at the most: a batch is cut so that they stay within rollout.cache_bytes."""
    longest = settings.rollout.max_new_tokens
    if settings.evaluation.problems is not None:
        longest = max(longest, settings.evaluation.max_new_tokens)
    tokens = settings.rollout.batch_size * min(shape.max_positions, 2 * longest)
    return min(float(settings.rollout.cache_bytes), cache_bytes_per_token(settings, shape) * tokens)


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Number of weights of LoRA adapters on all seven projections of every layer."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    ends = 2 * (shape.hidden_size + q) + 2 * (shape.hidden_size + kv) + 3 * (shape.hidden_size + shape.ffn_size)
    return rank * ends * shape.num_layers


def teacher_bytes(settings: Settings) -> int:
    """Bytes of the teacher's own values of each weight that is trained; 0 where it has none."""
    teacher, width = settings.objective.teacher, WIDTHS[settings.model.dtype]
    if not settings.objective.has_teacher:
        return 0
    if teacher.weights == "ema":
        return FLOAT32 + (width if teacher.ema_anchor > 0 else 0)  # and those that it is anchored to
    return width if teacher.weights == "initial" and settings.model.lora is None else 0


def checkpoint_bytes(settings: Settings, shape: ModelShape) -> int:
    """Bytes of one checkpoint, estimated: weights, the optimiser's float32 state, and the teacher's own weights."""
    trained = _trained(settings, shape)
    weights = shape.num_parameters + (trained if settings.model.lora is not None else 0)
    return weights * WIDTHS[settings.model.dtype] + trained * (OPTIMIZER_BYTES + teacher_bytes(settings))


def _saved(settings: Settings, shape: ModelShape) -> float:
    """Bytes of a checkpoint and, once more, of the optimiser's state: Megatron gathers a sharded one in host memory."""
    gathered = OPTIMIZER_BYTES * _trained(settings, shape) if settings.megatron.use_distributed_optimizer else 0
    return checkpoint_bytes(settings, shape) + gathered


def _trained(settings: Settings, shape: ModelShape) -> int:
    lora = settings.model.lora
    return shape.num_parameters if lora is None else adapter_parameters(shape, lora.rank)


def _memory(settings: Settings, shape: ModelShape, *, tp: int, pp: int, dp: int) -> dict[str, float]:
    """Bytes per rank of what is held at once; the last stage, with its share of embeddings."""
    width = WIDTHS[settings.model.dtype]
    embedding = shape.vocab_size * shape.hidden_size
    layers = shape.num_parameters - embedding * (1 if shape.tied else 2)
    weights = (layers / pp + embedding) / tp
    trained = weights
    if (lora := settings.model.lora) is not None:
        trained = adapter_parameters(shape, lora.rank) / pp / tp
    teacher, held = settings.objective.teacher, teacher_bytes(settings)
    resting = 0 if teacher.offload else held
    # In place for a pass an average is a copy in the student's type, and weights from host memory are a copy as well.
    passing = width if held and (teacher.offload or teacher.weights == "ema") else 0
    optimizer = OPTIMIZER_BYTES * trained / (dp if settings.megatron.use_distributed_optimizer else 1)
    tokens = settings.data.micro_batch_tokens / (tp if settings.megatron.sequence_parallel else 1)
    kept = 1 if settings.megatron.recompute_granularity == "full" else shape.num_layers / pp
    return {
        "weights": weights * width,
        "gradients": trained * FLOAT32,
        "optimiser": optimizer,
        "teacher": float(trained * (resting + passing)),
        # The loss's float32 sum, and the zeros that Megatron's hook is handed.
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
