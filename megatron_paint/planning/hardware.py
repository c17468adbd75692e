"""What this machine can run: Transformer Engine or plain torch, and on which device.

torch is imported when a function needs it, because mistakes in the settings are found before that.
"""

import importlib
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import RolloutSettings

if TYPE_CHECKING:
    import torch

# Transformer Engine reads it when it builds attention. Megatron-Core refuses deterministic_mode unless it is 0.
NONDETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


def missing_for_engine() -> str | None:
    """Why Transformer Engine cannot be used here; None if it can."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device was found"
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed (pip install --no-build-isolation 'megatron-paint[gpu]')"
    return _import_error("transformer_engine.pytorch")


@cache
def _import_error(module: str) -> str | None:
    """Why an installed module cannot be imported. Megatron would continue with a stand-in that fails in its layers."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        return (
            f"{module} cannot be imported ({lines[0] if lines else type(error).__name__}); it does not fit this torch"
        )
    return None


def use_transformer_engine(megatron: MegatronSettings) -> bool:
    """Whether layers come from Transformer Engine. UserError: a setting needs it, and it cannot be used."""
    if megatron.fp8_emulate:
        return False
    missing = missing_for_engine()
    if missing and megatron.transformer_impl == "transformer_engine":
        raise UserError(f"megatron.transformer_impl=transformer_engine: {missing}; set it to auto or local")
    if missing and megatron.fp8 is not None:
        raise UserError(
            f"megatron.fp8={megatron.fp8} needs Transformer Engine on a GPU: {missing}; set fp8=null, or "
            "fp8_emulate=true to compute the same rounding slowly in plain torch"
        )
    return missing is None and megatron.transformer_impl != "local"


def asks_transformer_engine(megatron: MegatronSettings) -> bool:
    """Whether layers come from Transformer Engine on a machine that has it."""
    return megatron.transformer_impl != "local" and not megatron.fp8_emulate


def check_optimizer_device(megatron: MegatronSettings) -> None:
    """UserError: the optimiser needs Transformer Engine or a GPU, and this machine cannot use it."""
    if megatron.use_precision_aware_optimizer and (missing := missing_for_engine()):
        raise UserError(
            "megatron.use_precision_aware_optimizer=true needs the Adam of Transformer Engine on a GPU: "
            f"{missing}; set it to false"
        )


def check_offloading_device(megatron: MegatronSettings, rollout: RolloutSettings) -> None:
    """UserError: activation offload or CUDA graphs are set, and this machine cannot do that."""
    if megatron.cpu_offloading and (missing := missing_for_engine()):
        raise UserError(
            f"megatron.cpu_offloading=true needs the layers of Transformer Engine on a GPU: {missing}; set it to false"
        )
    if rollout.cuda_graphs and gpu_bytes() is None:
        raise UserError("rollout.cuda_graphs=true captures CUDA graphs, and no CUDA device was found; set it to false")


def engine_environment(megatron: MegatronSettings) -> dict[str, str]:
    """Environment variables that Transformer Engine needs for these settings. UserError: one has another value."""
    if not (megatron.deterministic_mode and use_transformer_engine(megatron)):
        return {}
    given = os.environ.get(NONDETERMINISTIC, "0").strip()
    if given != "0":
        raise UserError(
            f"megatron.deterministic_mode=true, but the environment has {NONDETERMINISTIC}={given}, which lets "
            "Transformer Engine choose other kernels: unset it, or set deterministic_mode=false"
        )
    return {NONDETERMINISTIC: "0"}


def gpu_bytes() -> int | None:
    """Memory of the smallest GPU of this machine in bytes; None if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes, default=None)


def parse_gpu_memory(text: str | None) -> float | None:
    """Bytes of `--gpu-memory`, such as 80, 80GB or 79.6GiB; UserError for another text. None: not given."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|G)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * (2**30 if (match[2] or "").lower() == "gib" else 1e9) if match else 0.0
    if not 1e9 <= size <= 1e13:
        raise UserError(f"--gpu-memory={text!r} must be the memory of one GPU in GB (10^9 bytes) or GiB, such as 80GB")
    return size


def ranks_of_this_node(environ: Mapping[str, str]) -> int | None:
    """The number of ranks that torchrun or srun started on this node; None where neither says it."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        if match := re.match(r"[1-9]\d*", environ.get(name, "")):  # srun: 8(x2)
            return int(match[0])
    return None


def device_of_rank() -> "torch.device":
    """This rank's GPU, by LOCAL_RANK, or the CPU if there is no GPU. UserError: there are more ranks than GPUs."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if gpus == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        return torch.device("cuda", 0)  # `srun --gpus-per-task=1` shows each task only its own GPU
    if local_rank >= gpus:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine shows {count_text(gpus, 'GPU')} to the rank: start at most one "
            "rank a GPU (torchrun --nproc-per-node, srun --ntasks-per-node)"
        )
    return torch.device("cuda", local_rank)
