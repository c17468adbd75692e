"""The plan of a training run: its layout, the derived numbers, and an estimate of the memory per rank."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_paint.base.counts import count_text
from megatron_paint.config.load import contradict
from megatron_paint.config.settings import Settings
from megatron_paint.planning.estimate import MemoryEstimate, checkpoint_bytes, estimate
from megatron_paint.planning.hardware import (
    asks_transformer_engine,
    check_offloading_device,
    check_optimizer_device,
    engine_environment,
    gpu_bytes,
    use_transformer_engine,
)
from megatron_paint.planning.layout import (
    Layout,
    check_auxiliary_losses,
    check_profiled_ranks,
    check_sizes,
    common_tensor_parallel_size,
    expert_sizes,
    layout_of,
    megatron_version,
    trainer_samples,
)
from megatron_paint.planning.stage_memory import Peak, micro_batch_tokens

__all__ = ["Plan", "checkpoint_bytes", "make_plan"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The machines that a run is planned for, which may be others than this one."""

    gpus: bool
    gpu_memory: float | None  # bytes of one GPU; None: not known here
    triton: bool  # its kernels compute the loss
    ranks_per_node: int


@dataclass(frozen=True, kw_only=True)
class Plan(Layout):
    """A layout with the derived numbers of a run. Sizes are in bytes on the rank that needs most."""

    kernel: str  # implementation of the loss's elementwise work
    why_torch: str  # why Triton cannot be used; empty if it can
    target: Target
    memory: MemoryEstimate
    settings: Settings

    def lines(self, settings: Settings) -> list[str]:
        """The plan as lines for the console."""
        shape = self.shape
        problems, responses = settings.data.problems_per_step, settings.needs.samples_per_problem
        each = f" with {responses} responses each" if responses > 1 else ""
        tokens, asked = micro_batch_tokens(settings, shape), settings.data.micro_batch_tokens
        alone = (
            f" (a response above data.micro_batch_tokens={asked} alone, without its prompt)" if tokens > asked else ""
        )
        return [
            f"model      {count_text(shape.num_parameters, 'weight')}, {count_text(shape.num_layers, 'layer')}, hidden "
            f"{shape.hidden_size}, {shape.num_heads} heads / {shape.num_groups} groups, vocabulary "
            f"{shape.vocab_size:,}{', tied' if shape.tied else ''}",
            f"layout     {count_text(self.processes, 'process')} = tensor {self.tensor_parallel} x pipeline "
            f"{self.pipeline_parallel}{f' x context {self.context_parallel}' if self.context_parallel > 1 else ''} x "
            f"data {self.data_parallel}{self._experts_text()}; {self.split}, "
            f"{count_text(shape.vocab_rows(self.tensor_parallel), 'vocabulary row')} a rank",
            f"layers     {'Transformer Engine' if self.uses_engine else 'plain torch'}, {settings.model.dtype}"
            f"{f', FP8 {settings.megatron.fp8} {settings.megatron.fp8_recipe}' if settings.megatron.fp8 else ''}",
            f"loss       elementwise work by {self.kernel}"
            f"{f' ({self.why_torch})' if self.kernel == 'torch' and self.why_torch else ''}, chunks of "
            f"{size_text(settings.objective.chunk_bytes)}",
            f"step       {count_text(problems, 'problem')}{each}, about {problems / self.data_parallel:g} a replica, "
            f"micro-batches of at most {count_text(tokens, 'token')}{alone}; {count_text(settings.run.steps, 'step')}",
            *self.memory_lines(),
        ]

    def _experts_text(self) -> str:
        if not self.shape.num_experts:
            return ""
        return (
            f"; {count_text(self.shape.num_experts, 'expert')} a layer = expert {self.expert_parallel} x expert tensor "
            f"{self.expert_tensor_parallel} x copies {self.expert_replicas}"
        )

    def memory_lines(self) -> list[str]:
        """The estimate alone: the two peaks of a rank, the GPU's memory, and host memory."""
        memory, target = self.memory, self.target
        lines = [f"memory     {_peak_text('training', memory.training)}"]
        if memory.sampling is not None:
            lines.append(f"           {_peak_text('sampling', memory.sampling)}")
        if target.gpu_memory is not None:
            share = memory.peak / target.gpu_memory
            lines.append(
                f"           the larger peak, {size_text(memory.peak)}, is {share:.0%} of a GPU's "
                f"{size_text(target.gpu_memory)} (estimate, docs/memory.md)"
            )
        elif target.gpus:
            lines.append(
                f"           the larger peak is {size_text(memory.peak)} (estimate, docs/memory.md); the GPUs' memory "
                "is not known here: --gpu-memory 80GB compares with it"
            )
        else:
            lines.append(
                "           for ranks on CPUs (estimate, docs/memory.md): --gpu-memory 80GB plans for GPUs instead"
            )
        host = memory.host
        lines.append(
            f"host       about {size_text(host.rank)} a rank and {size_text(host.node)} on a node of "
            f"{count_text(host.ranks, 'rank')}, while a checkpoint is copied (estimate)"
        )
        return lines

    def warnings(self) -> list[str]:
        """One warning if the estimate is above a GPU's memory, with what would help; else none."""
        limit, peak = self.target.gpu_memory, self.memory.peak
        if limit is None or peak <= limit:
            return []
        helps = [f"{change} (to {size_text(after)})" for change, after in self._remedies()]
        advice = f". Changes that lower the peak, each one alone: {'; '.join(helps)}" if helps else ""
        return [
            f"the estimated peak of {size_text(peak)} a rank is above a GPU's {size_text(limit)}: a rank will probably "
            f"run out of memory{advice}"
        ]

    def _remedies(self) -> Iterator[tuple[str, float]]:
        """Changes that the settings allow and that lower the peak by at least a hundredth.

        They are in the order in which they should be tried.
        """
        for text, changed, processes in _changes(self.settings, self):
            if contradict(changed):
                continue
            tp, pp = changed.megatron.tensor_model_parallel_size, self.pipeline_parallel
            layout = Layout(
                shape=self.shape,
                processes=processes,
                tensor_parallel=tp,
                pipeline_parallel=pp,
                data_parallel=processes // (tp * pp * self.context_parallel),
                context_parallel=self.context_parallel,
                split=self.split,
                uses_engine=self.uses_engine,
                **expert_sizes(self.shape, changed.megatron),
            )
            after = _estimate(changed, layout, self.target).peak
            if after < 0.99 * self.memory.peak:
                yield text, after


def make_plan(
    settings: Settings,
    *,
    processes: int,
    gpu_memory: float | None = None,
    ranks_per_node: int | None = None,
    on_gpu_nodes: bool | None = None,
) -> Plan:
    """The plan of a training run. UserError names the setting that does not fit, and the nearest valid value.

    gpu_memory: bytes of one GPU; None: of this machine's GPU, if the run is for this machine. on_gpu_nodes: whether the
    run is for other nodes with GPUs or without; None: for this machine. ranks_per_node: None: all are on one node.
    """
    megatron, asked = settings.megatron, settings.objective.kernel
    samples = trainer_samples(settings)
    shape = check_sizes(settings.model, megatron, settings.rollout, processes=processes, samples=samples)
    check_profiled_ranks(settings.run.profile, processes=processes)
    check_auxiliary_losses(megatron, version=megatron_version())
    # Imports torch, which a mistake in the settings must not wait for.
    from megatron_paint.losses.elementwise.choose import loss_kernel, missing_for_triton

    found = gpu_bytes() if on_gpu_nodes is None else None
    # Of GPUs elsewhere nothing is known except the settings: what they ask for will be there.
    elsewhere = found is None and (on_gpu_nodes or (on_gpu_nodes is None and gpu_memory is not None))
    if elsewhere:
        uses_engine, kernel = asks_transformer_engine(megatron), "torch" if asked == "torch" else "triton"
    else:
        engine_environment(megatron)
        uses_engine, kernel = use_transformer_engine(megatron), loss_kernel(asked)
        check_optimizer_device(megatron)
        check_offloading_device(megatron, settings.rollout)
    layout = layout_of(shape, megatron, processes=processes, uses_engine=uses_engine)
    target = Target(
        gpus=elsewhere or found is not None,
        gpu_memory=gpu_memory or found,
        triton=kernel == "triton",
        ranks_per_node=ranks_per_node or processes,
    )
    return Plan(
        **vars(layout),
        kernel=kernel,
        why_torch="" if elsewhere else missing_for_triton() or "",
        target=target,
        memory=_estimate(settings, layout, target),
        settings=settings,
    )


def size_text(count: float) -> str:
    """Bytes with three digits, in units of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _estimate(settings: Settings, layout: Layout, target: Target) -> MemoryEstimate:
    return estimate(
        settings,
        layout,
        engine=layout.uses_engine,
        triton=target.triton,
        on_gpus=target.gpus,
        ranks_per_node=target.ranks_per_node,
    )


def _peak_text(name: str, peak: Peak) -> str:
    parts = ", ".join(f"{part} {size_text(size)}" for part, size in peak.parts.items() if size)
    return f"{name} {size_text(peak.total)} a rank ({peak.moment}): {parts}"


def _changes(settings: Settings, layout: Layout) -> Iterator[tuple[str, Settings, int]]:
    """What may help against too little memory, each change alone: a text, the settings, and the number of ranks."""
    megatron, data, rollout, ranks = settings.megatron, settings.data, settings.rollout, layout.processes
    tp, most = layout.tensor_parallel, common_tensor_parallel_size(layout.shape)
    places = ranks // (layout.pipeline_parallel * layout.context_parallel)
    experts, of_one = layout.shape.num_experts, layout.expert_tensor_parallel
    of_stage = ranks // layout.pipeline_parallel
    parts = [
        n for n in range(layout.expert_parallel + 1, experts + 1) if experts % n == 0 and of_stage % (n * of_one) == 0
    ]
    for size in parts[:1]:
        changed = replace(megatron, expert_model_parallel_size=size)
        yield f"megatron.expert_model_parallel_size={size}", replace(settings, megatron=changed), ranks
    if experts and megatron.expert_tensor_parallel_size is None:
        most = math.gcd(most, layout.shape.expert_ffn_size, of_stage // layout.expert_parallel)
    larger = [size for size in range(tp + 1, places + 1) if most % size == 0 and places % size == 0]
    if settings.model.lora is not None and settings.model.lora.experts and megatron.expert_tensor_parallel_size is None:
        larger = []  # ranks would share an expert, which its adapters do not allow
    for size in larger[:1]:
        changed = replace(megatron, tensor_model_parallel_size=size, sequence_parallel=True)
        text = f"megatron.tensor_model_parallel_size={size} megatron.sequence_parallel=true"
        yield text, replace(settings, megatron=changed), ranks
    if not megatron.use_distributed_optimizer and layout.data_parallel * layout.context_parallel > 1:
        changed = replace(megatron, use_distributed_optimizer=True)
        yield "megatron.use_distributed_optimizer=true", replace(settings, megatron=changed), ranks
    if megatron.recompute_granularity != "full":
        full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        text = " ".join(f"megatron.{name}={value}" for name, value in full.items())
        yield text, replace(settings, megatron=replace(megatron, **full)), ranks
    if not settings.needs.samples_per_problem and micro_batch_tokens(settings, layout.shape) > data.micro_batch_tokens:
        changed = replace(settings, data=replace(data, max_tokens=data.micro_batch_tokens))
        yield f"data.max_tokens={data.micro_batch_tokens}", changed, ranks
    tokens = math.ceil(data.micro_batch_tokens / 2)
    changed = replace(settings, data=replace(data, micro_batch_tokens=tokens))
    yield f"data.micro_batch_tokens={tokens}", changed, ranks
    rows = math.ceil(rollout.batch_size / 2)
    yield f"rollout.batch_size={rows}", replace(settings, rollout=replace(rollout, batch_size=rows)), ranks
    teacher = settings.objective.teacher
    if not teacher.offload:
        objective = replace(settings.objective, teacher=replace(teacher, offload=True))
        yield "objective.teacher.offload=true", replace(settings, objective=objective), ranks
    yield f"{2 * ranks} ranks", settings, 2 * ranks
