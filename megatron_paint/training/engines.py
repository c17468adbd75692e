"""The rollout engine of a run, by `rollout.engine`."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import EvaluateSettings, RolloutSettings, Settings
from megatron_paint.config.vllm import Transfer, VllmSettings, logprobs_mode
from megatron_paint.data.prompts import Prompts
from megatron_paint.evaluation.evaluator import Evaluator
from megatron_paint.models.shape import ModelShape
from megatron_paint.records import Problem
from megatron_paint.rollouts.ahead import RolloutsAhead
from megatron_paint.rollouts.engine import Sampler
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.runtime.rank_zero import directly
from megatron_paint.training.inputs import replay_sampler, rollout_source
from megatron_paint.training.server_room import check_room_for_answers

if TYPE_CHECKING:
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.mcore.ranks import Ranks
    from megatron_paint.rollouts.vllm.fleet import Fleet

MEMORY = Path("/dev/shm")


def start_servers(
    settings: Settings, shape: ModelShape, *, note: Callable[[str], None], stack: ExitStack
) -> "list[Fleet]":
    """Starts the servers of `rollout.engine: vllm`, on rank 0. They load while the trainer builds its model.

    Returns their fleet; empty for other engines.
    """
    if settings.rollout.engine != "vllm" or not settings.needs.samples_per_problem:
        return []
    check_gpus(settings.rollout.vllm)
    run_folder = Path(settings.run.dir)
    fleet = new_fleet(
        settings.rollout,
        shape,
        dtype=settings.model.dtype,
        logs=run_folder / "logs",
        remove=transfer_folder(settings.rollout, run_folder),
        note=note,
        lora_rank=settings.model.lora.rank if settings.rollout.lora_transfer == "adapter" else None,
        transfer=settings.rollout.vllm.transfer,
    )
    stack.callback(fleet.close)
    fleet.start(Path(settings.model.hf_path).resolve())
    if settings.rollout.vllm.transfer == "ipc":  # vLLM measures the memory that is free, so the trainer comes later
        fleet.wait_until_ready()
        fleet.sleep()
    return [fleet]


def check_gpus(vllm: VllmSettings) -> None:
    """UserError: servers cannot have these GPUs with this way of sending weights, or it cannot be had at all."""
    import torch

    files = vllm.transfer == "file"
    name = f"rollout.vllm.transfer={vllm.transfer}"
    if not torch.cuda.is_available():
        if files:
            return
        raise UserError(f"{name} sends weights from GPU to GPU, and this machine has none: set it to file")
    own = gpus_of_ranks(os.environ, torch.cuda.device_count())
    if files:
        _check_own_memory(vllm, own)
        return
    from megatron_paint.rollouts.vllm.trainer_side import import_vllm

    import_vllm(vllm.transfer)
    theirs = [gpu.strip() for group in vllm.devices for gpu in group.split(",")]
    if own is None or len({gpu.isdecimal() for gpu in (*own, *theirs)}) > 1:  # a number and a UUID do not compare
        return
    shared = [gpu for gpu in theirs if gpu in own]
    if vllm.transfer == "nccl" and shared:
        raise UserError(
            f"rollout.vllm.devices names GPU {shared[0]} of the ranks, and NCCL cannot send from a GPU to itself: give "
            "the servers other GPUs, or set rollout.vllm.transfer to ipc"
        )
    if vllm.transfer == "ipc" and len(shared) < len(theirs):
        other = next(gpu for gpu in theirs if gpu not in own)
        raise UserError(
            f"rollout.vllm.devices names GPU {other}, which no rank has (theirs: {', '.join(own)}): {name} reads the "
            "memory of the rank on the same GPU; give the servers GPUs of the ranks, or set it to nccl"
        )


def _check_own_memory(vllm: VllmSettings, own: list[str] | None) -> None:
    """UserError: servers would take the usual part of a GPU's memory on a GPU of the ranks."""
    if vllm.urls or own is None or vllm.gpu_memory != VllmSettings.gpu_memory:
        return
    theirs = [gpu.strip() for group in vllm.devices for gpu in group.split(",")] or own
    shared = next((gpu for gpu in theirs if gpu in own), None)
    if shared is not None:
        named = f"names GPU {shared}, which a rank has" if vllm.devices else "is empty, so servers take those of ranks"
        raise UserError(
            f"rollout.vllm.devices {named} (theirs: {', '.join(own)}), and a server takes {vllm.gpu_memory:g} of a "
            "GPU's memory: name GPUs that no rank has and start fewer ranks (--processes), or set "
            "rollout.vllm.transfer to ipc, or choose rollout.vllm.gpu_memory"
        )


def gpus_of_ranks(environment: Mapping[str, str], count: int) -> list[str] | None:
    """The GPUs of the ranks on this machine, by the names that CUDA_VISIBLE_DEVICES takes.

    count: GPUs that this process sees. None: it sees its own alone, whose name elsewhere is not known.
    """
    ranks = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if count < ranks or (count == 1 and "LOCAL_WORLD_SIZE" not in environment and "RANK" in environment):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(gpu) for gpu in range(count)]
    return names[:ranks]


def new_fleet(
    rollout: RolloutSettings,
    shape: ModelShape,
    *,
    dtype: str,
    logs: Path,
    note: Callable[[str], None],
    remove: Path | None = None,
    temperature: float | None = None,
    lora_rank: int | None = None,
    transfer: Transfer = "file",
) -> "Fleet":
    """A fleet without servers.

    remove: a folder that is removed when this process dies. temperature: of the sampling; None: rollout's. lora_rank:
    of the adapters that servers load; None: they load none. transfer: how they get weights, if they get any.
    """
    import torch

    from megatron_paint.rollouts.vllm.command import ServerOptions
    from megatron_paint.rollouts.vllm.fleet import Fleet

    vllm, on_gpus = rollout.vllm, torch.cuda.is_available()
    if on_gpus and not vllm.urls and not vllm.devices:
        raise UserError(
            "rollout.vllm.devices is not set, and the servers would take the GPUs of the ranks: give the GPUs of each "
            "server, such as ['6', '7'], and start fewer ranks"
        )
    engine = ServerOptions(
        settings=rollout.vllm,
        dtype=dtype,
        logprobs_mode=logprobs_mode(rollout.temperature if temperature is None else temperature),
        on_gpus=on_gpus,
        remove=remove,
        lora_rank=lora_rank,
        transfer=transfer,
    )
    return Fleet(engine, vocab_size=shape.vocab_size, logs=logs, note=note)


def evaluation_servers(
    settings: EvaluateSettings,
    shape: ModelShape,
    evaluators: Sequence[Evaluator],
    *,
    logs: Path,
    note: Callable[[str], None],
    stack: ExitStack,
) -> Sampler:
    """Servers of a model that does not change, in the only process of an evaluation.

    UserError: a server does not start, or has no room for a prompt of these evaluators and its answer.
    """
    from megatron_paint.rollouts.vllm.sampler import VllmSampler

    model = Path(settings.model.hf_path).resolve()
    temperature = settings.evaluation.temperature
    fleet = new_fleet(
        settings.rollout, shape, dtype=settings.model.dtype, logs=logs, note=note, temperature=temperature
    )
    stack.callback(fleet.close)
    fleet.start(model)
    fleet.wait_until_ready()
    for evaluator in evaluators:
        check_room_for_answers(fleet, evaluator)
    return VllmSampler(
        fleet,
        weights=None,
        transfer=None,
        spot_check=None,
        start_model=model,
        exports=None,
        on_rank_zero=directly,
    )


def transfer_folder(rollout: RolloutSettings, run_folder: Path) -> Path:
    """The folder of this run alone through which weights reach the servers."""
    name = f"megatron_paint_{hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:12]}"
    folder = rollout.vllm.transfer_folder
    return (MEMORY if folder is None else Path(folder)) / name


def training_samplers(
    settings: Settings,
    prompts: Prompts,
    policy: "MegatronPolicy",
    ranks: "Ranks",
    fleet: "Fleet | None",
    stack: ExitStack,
) -> tuple[Sampler, Sampler]:
    """The sampler of the objective, and that of evaluations and the self-check; `fleet` is only on rank 0."""
    if not settings.needs.samples_per_problem:
        return policy.sampler, policy.sampler
    match settings.rollout.engine:
        case "replay":
            return replay_sampler(settings, prompts), policy.sampler
        case "vllm":
            sampler = _vllm_sampler(settings, policy, ranks, fleet, stack)
            return sampler, sampler
    return policy.sampler, policy.sampler


def training_rollouts(
    settings: Settings,
    prompts: Prompts,
    sampler: Sampler,
    *,
    upcoming: Callable[[int], Sequence[Problem]],
    policy: "MegatronPolicy",
) -> RolloutSource:
    """The rollouts of the run's objective. upcoming: the problems of a step."""
    rollout = settings.rollout
    if not rollout.ahead:
        return rollout_source(settings, prompts, sampler)
    needs_logprobs = settings.objective.name == "grpo" or rollout.importance_limit is not None
    score = partial(policy.logprobs, weights="current", temperature=rollout.temperature)
    rollouts = RolloutsAhead(
        sampler,
        prompts,
        rollout,
        samples=settings.needs.samples_per_problem,
        seed=settings.run.seed,
        upcoming=lambda step: upcoming(step) if step <= settings.run.steps else (),
        score=score if needs_logprobs and not rollout.vllm_has_logprobs else None,
    )
    policy.before_change = rollouts.score_ahead
    return rollouts


def _vllm_sampler(
    settings: Settings, policy: "MegatronPolicy", ranks: "Ranks", fleet: "Fleet | None", stack: ExitStack
) -> Sampler:
    from megatron_paint.mcore.collectives import all_ranks_do, rank_zero_does
    from megatron_paint.mcore.device_weights import ReplicaWeights
    from megatron_paint.mcore.weight_source import StageWeights
    from megatron_paint.rollouts.vllm.adapter_transfer import AdapterTransfer
    from megatron_paint.rollouts.vllm.device_transfer import DeviceTransfer
    from megatron_paint.rollouts.vllm.file_transfer import FileTransfer
    from megatron_paint.rollouts.vllm.sampler import VllmSampler
    from megatron_paint.rollouts.vllm.spot_check import SpotCheck

    rollout, run_folder, on_rank_zero = settings.rollout, Path(settings.run.dir), partial(rank_zero_does, ranks)
    weights = StageWeights(policy.stage, policy.shape, ranks, settings.model)
    folder, how = transfer_folder(rollout, run_folder), rollout.vllm.transfer
    if rollout.lora_transfer == "adapter":
        transfer = AdapterTransfer(weights, folder=folder, on_rank_zero=on_rank_zero)
    elif how != "file":
        weights = ReplicaWeights(policy.stage, policy.shape, ranks, settings.model, all_replicas=how == "ipc")
        transfer = DeviceTransfer(
            weights,
            transfer=how,
            rank=ranks.rank,
            message_bytes=int(rollout.transfer_bytes),
            on_rank_zero=on_rank_zero,
            everyone=partial(all_ranks_do, ranks),
        )
    else:
        transfer = FileTransfer(
            weights,
            rank=ranks.rank,
            message_bytes=int(rollout.transfer_bytes),
            folder=folder,
            in_memory=rollout.vllm.transfer_folder is None,
            on_rank_zero=on_rank_zero,
            everyone=partial(all_ranks_do, ranks),
        )
    if ranks.rank == 0:
        stack.callback(transfer.close)
    on_rank_zero(lambda: fleet.wait_until_ready(transfer.init_info))
    sampler = VllmSampler(
        fleet,
        weights=weights,
        transfer=transfer,
        spot_check=SpotCheck(partial(policy.logprobs, weights="current"), limit=settings.run.sampler_gap_limit),
        start_model=Path(settings.model.hf_path).resolve(),
        exports=run_folder / "vllm",
        on_rank_zero=on_rank_zero,
    )
    if ranks.rank == 0:
        stack.callback(sampler.close)
    return sampler
