"""Processes, devices and their groups, started the same way by torchrun, srun and the local launcher."""

import logging
import math
import os
import random
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses.cpu_math import settle_cpu_math
from megatron_paint.mcore.cpu import redirect_cuda_to_cpu
from megatron_paint.planning.hardware import device_of_rank, engine_environment
from megatron_paint.planning.layout import data_parallel_size
from megatron_paint.planning.stages import chunks_a_stage

# For messages between hosts: all ranks wait in one while rank 0 grades a data set or writes to a slow disk.
HOST_TIMEOUT = timedelta(hours=12)
TIMEOUT = timedelta(minutes=10)  # torch's default for NCCL


@dataclass(frozen=True, kw_only=True)
class ShardRanks:
    """The ranks of a stage that each have one shard of a weight, and the copies of these shards on other ranks."""

    rank: int
    size: int
    group: dist.ProcessGroup
    replica: int  # which copy this rank has a shard of
    replicas: int


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank in each dimension.

    Neighbouring ranks share layers (tensor parallel). Then come those that share the tokens of a micro-batch (context
    parallel), data-parallel replicas, and pipeline stages.
    """

    rank: int
    size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    pp_group: dist.ProcessGroup
    cp_rank: int  # context parallel: each rank has the weights of its stage and a slice of every row
    cp_size: int
    cp_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    dp_cp_rank: int  # of the copies of the weights: each context-parallel rank of each replica has one
    dp_cp_size: int
    ep_rank: int  # expert parallel: which part of each layer's experts this rank has
    ep_size: int
    expert_shards: ShardRanks  # of each expert: expert tensor parallel, and the copies of the experts of a layer
    expert_group: dist.ProcessGroup  # the ranks of a stage that together have all experts of a layer once
    step_group: dist.ProcessGroup | None  # gloo: copies that share experts, all stages; None: they share none
    copy_group: dist.ProcessGroup  # the ranks of one copy of the weights: stage by stage, tensor-parallel ranks within
    host_group: dist.ProcessGroup  # gloo, all ranks: for records and messages
    writer_group: dist.ProcessGroup  # the same, for a thread that writes while they are busy

    @property
    def copy_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def dense_shards(self) -> ShardRanks:
        """Of every weight except the experts'."""
        return ShardRanks(
            rank=self.tp_rank,
            size=self.tp_size,
            group=self.tp_group,
            replica=self.dp_cp_rank,
            replicas=self.dp_cp_size,
        )

    def shards_of(self, name: str) -> ShardRanks:
        """The ranks that share the parameter `name` of a stage."""
        return self.expert_shards if is_expert(name) else self.dense_shards

    def first_expert(self, num_experts: int) -> int:
        """Global index of this rank's first expert."""
        return self.ep_rank * num_experts // self.ep_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def is_expert(name: str) -> bool:
    """Whether a parameter of a stage belongs to an expert of a mixture."""
    return ".mlp.experts." in name


def start_ranks(megatron: MegatronSettings, *, hang_seconds: float | None = None, backend: str | None = None) -> Ranks:
    """Joins the process group that RANK, WORLD_SIZE and MASTER_ADDR describe and forms Megatron's groups.

    Without these variables this process is the only rank. The backend is NCCL with CUDA, otherwise gloo. hang_seconds:
    the longest time until something other than a collective's time-out ends a hang.
    """
    _silence_known_warnings()
    os.environ.update(engine_environment(megatron))  # before Megatron imports Transformer Engine
    settle_cpu_math()
    _allow_many_connections()
    device = device_of_rank()
    redirect_cuda_to_cpu()
    from megatron.core import parallel_state

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = _collective_timeout(megatron, hang_seconds)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group(backend or ("nccl" if on_gpu else "gloo"), timeout=timeout, **alone)
    data_parallel_size(dist.get_world_size(), megatron)
    chunks = chunks_a_stage(megatron)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=megatron.context_parallel_size,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=megatron.num_distributed_optimizer_instances,
        distributed_timeout_minutes=timeout // timedelta(minutes=1),
    )
    _seed_libraries()
    return Ranks(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_cp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_shards=ShardRanks(
            rank=parallel_state.get_expert_tensor_parallel_rank(),
            size=parallel_state.get_expert_tensor_parallel_world_size(),
            group=parallel_state.get_expert_tensor_parallel_group(),
            replica=parallel_state.get_expert_data_parallel_rank(),
            replicas=parallel_state.get_expert_data_parallel_world_size(),
        ),
        expert_group=parallel_state.get_expert_tensor_and_model_parallel_group(),
        step_group=_step_group(megatron, timeout),
        copy_group=parallel_state.get_model_parallel_group(),
        host_group=dist.new_group(backend="gloo", timeout=HOST_TIMEOUT),
        writer_group=dist.new_group(backend="gloo", timeout=HOST_TIMEOUT),
    )


def _step_group(megatron: MegatronSettings, timeout: timedelta) -> dist.ProcessGroup | None:
    """The group of `Ranks.step_group`.

    The copies of a stage are neighbouring ranks, and so are the ranks of a set that has all experts once. If a set
    contains ranks of several copies, these copies must call their layers together.
    """
    replica, experts = megatron.tensor_model_parallel_size, megatron.expert_parallel_ranks
    together, stage = math.lcm(replica, experts), dist.get_world_size() // megatron.pipeline_model_parallel_size
    mine = None
    if together == replica:
        return mine
    for first in range(0, stage, together):
        ranks = [begin + first + place for begin in range(0, dist.get_world_size(), stage) for place in range(together)]
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        mine = group if dist.get_rank() in ranks else mine
    return mine


def _collective_timeout(megatron: MegatronSettings, hang_seconds: float | None) -> timedelta:
    if megatron.distributed_timeout_minutes is not None:
        return timedelta(minutes=megatron.distributed_timeout_minutes)
    return TIMEOUT + timedelta(seconds=hang_seconds or 0.0)


def stop_ranks() -> None:
    """Destroys Megatron's groups and the process group; a second call does nothing."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def joined_ranks(megatron: MegatronSettings, *, hang_seconds: float | None = None) -> Iterator[Ranks]:
    """The groups of `start_ranks`, stopped at the end.

    After an error they are stopped only if this rank is the only one: other ranks may still wait for this one.
    """
    ranks = start_ranks(megatron, hang_seconds=hang_seconds)
    try:
        yield ranks
    except BaseException:
        if ranks.size == 1:
            stop_ranks()
        raise
    stop_ranks()


def _allow_many_connections() -> None:
    """Raises the limit of open files to the system's maximum: a gloo group needs one file per rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # a system may report a higher limit than it allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _silence_known_warnings() -> None:
    """Hides library warnings that a user cannot act on; `megatron-paint doctor` reports what is missing."""
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint\..*")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # Megatron-Core imports it on every rank; it reports that CUDA is installed and no GPU is present.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: not record.getMessage().startswith("No CUDA runtime is found, using CUDA_HOME")
    )


def _seed_libraries() -> None:
    """Seeds the generators that Megatron requires; no result of this project is drawn from them."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
