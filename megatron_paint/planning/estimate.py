"""An estimate of the memory of a training run, for each rank's GPU and for the host. It needs only the settings and the
model's config.json. `stage_memory.py` has the parts.
"""

from dataclasses import dataclass

from megatron_paint.config.settings import Settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.activations import FLOAT32
from megatron_paint.planning.layout import WIDTHS, Layout
from megatron_paint.planning.stage_memory import MOMENTS, Peak, StageMemory, teacher_bytes
from megatron_paint.planning.weights import adapter_parameters

# Ours: memory of a Python process that has imported torch and Megatron-Core, with and without CUDA's libraries.
PROCESS_BYTES = {True: 3.0e9, False: 0.8e9}


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of host memory while a checkpoint is copied and written."""

    rank: float  # a rank that writes
    node: float  # the node with most
    ranks: int  # of that node


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The two peaks of a rank's GPU, and host memory."""

    training: Peak
    sampling: Peak | None  # None: nothing is sampled
    host: HostMemory

    @property
    def peak(self) -> float:
        """Bytes of the larger peak."""
        return max(self.training.total, self.sampling.total if self.sampling else 0.0)


def estimate(
    settings: Settings, layout: Layout, *, engine: bool, triton: bool, on_gpus: bool, ranks_per_node: int
) -> MemoryEstimate:
    """engine: layers of Transformer Engine; triton: its kernels compute the loss; on_gpus: count CUDA's own memory."""
    stages = [
        StageMemory(settings, layout, stage=stage, engine=engine, triton=triton, on_gpus=on_gpus)
        for stage in range(layout.pipeline_parallel)
    ]
    training = max((peak for stage in stages for peak in stage.training()), key=lambda peak: peak.total)
    sampling = max((peak for stage in stages for peak in stage.sampling()), key=lambda peak: peak.total, default=None)
    host = _host(stages, settings, layout, ranks_per_node=ranks_per_node)
    return MemoryEstimate(training=training, sampling=sampling, host=host)


def _host(stages: list[StageMemory], settings: Settings, layout: Layout, *, ranks_per_node: int) -> HostMemory:
    """A rank has its process and what is offloaded. Ranks with a first copy of weights have a checkpoint's part."""
    sharing = layout.expert_parallel * layout.expert_tensor_parallel
    copies = layout.data_parallel * layout.context_parallel
    ranks = []
    for stage in stages:  # the order of Megatron's ranks: stages, then copies, then tensor-parallel ranks
        resting = PROCESS_BYTES[stage.on_gpus] + stage.offloaded_bytes()
        experts, rest = stage.saved()
        ranks += [
            resting + experts * (place < sharing) + rest * (place < layout.tensor_parallel)
            for place in range(copies * layout.tensor_parallel)
        ]
    nodes = [ranks[first : first + ranks_per_node] for first in range(0, len(ranks), ranks_per_node)]
    most = max(nodes, key=sum)
    return HostMemory(rank=max(ranks), node=sum(most), ranks=len(most))


def checkpoint_bytes(settings: Settings, shape: ModelShape) -> int:
    """Estimated bytes of one checkpoint: weights, the optimiser's float32 state, and the teacher's own weights."""
    lora = settings.model.lora
    adapters = 0 if lora is None else adapter_parameters(shape, lora.rank, experts=lora.experts)
    trained = shape.num_parameters if lora is None else adapters
    optimizer = FLOAT32 * (1 + MOMENTS["adam"])
    weights = (shape.num_parameters + adapters) * WIDTHS[settings.model.dtype]
    return weights + trained * (optimizer + teacher_bytes(settings))
