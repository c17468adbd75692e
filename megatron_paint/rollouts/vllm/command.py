"""The command line and environment of a vLLM server: ours, or one that a user starts for `rollout.vllm.urls`."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.config.vllm import Transfer, VllmSettings

FILE_BACKEND = "megatron_paint_file"  # the name under which plugin.py registers its engine in vLLM
BACKENDS = {"file": FILE_BACKEND}  # the others are vLLM's own, under the same names
# What torchrun, srun's scripts and our launcher set for a rank. A server that reads it takes itself for a rank.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "ROLE_NAME", "ROLE_WORLD_SIZE", "CUDA_DEVICE_MAX_CONNECTIONS"),
)
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank may be
# What is right for the Python of the trainer alone.
OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS")
# vLLM's sleep mode uses its own allocator. The allocator refuses `expandable_segments`.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
RANK_PREFIXES = ("TORCHELASTIC_", "SLURM_", "MEGATRON_PAINT_", "PMI_")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server is started with besides its model."""

    settings: VllmSettings
    dtype: str
    logprobs_mode: str
    transfer: Transfer = "file"
    lora_rank: int | None = None  # adapters are loaded while it runs; None: it has none
    on_gpus: bool = True
    remove: Path | None = None  # a folder that is removed when the run's process dies


def server_command(engine: ServerOptions, model: Path, port: int) -> list[str]:
    """The command of a server of `model` on the loopback interface."""
    settings = engine.settings
    program = settings.command or (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    command = [
        *program,
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", engine.dtype),
        *("--skip-tokenizer-init", "--generation-config", "vllm", "--enable-scale-out"),
        *("--tensor-parallel-size", str(settings.tensor_parallel), "--logprobs-mode", engine.logprobs_mode),
        *("--weight-transfer-config", json.dumps({"backend": BACKENDS.get(engine.transfer, engine.transfer)})),
    ]
    if engine.transfer == "ipc":
        command += ["--enable-sleep-mode"]
    if settings.max_model_len is not None:
        command += ["--max-model-len", str(settings.max_model_len)]
    if engine.on_gpus:
        command += ["--gpu-memory-utilization", str(settings.gpu_memory)]
    else:
        # Compiling costs minutes, and nothing is gained without a GPU. If a prompt with a seed is divided between two
        # batches, vLLM's engine on CPUs ends ("CPU Generator does not use offset").
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    if engine.lora_rank is not None:
        rank = next((rank for rank in LORA_RANKS if rank >= engine.lora_rank), engine.lora_rank)
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]
    return [*command, *settings.extra_args]


def server_environment(engine: ServerOptions, number: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of server `number`: that of this process without what makes a process a rank."""
    base = os.environ if base is None else base
    left_out = {*RANK_VARIABLES, *OWN_VARIABLES, *(ALLOCATOR_VARIABLES if engine.transfer == "ipc" else ())}
    kept = {key: value for key, value in base.items() if key not in left_out and not key.startswith(RANK_PREFIXES)}
    kept |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    # A server that closes an idle connection while a request is on its way looks like one that died.
    kept["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "600"
    if engine.transfer == "ipc":
        # Handles of CUDA memory are tuples that JSON has not, so they are pickled. Our servers listen to this machine.
        kept["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if not engine.on_gpus:
        # The kernel divides the cores: a pinned server would wait for the ranks on its cores.
        kept |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu"}
    if engine.settings.devices:
        kept["CUDA_VISIBLE_DEVICES"] = engine.settings.devices[number]
    return kept | engine.settings.environment
