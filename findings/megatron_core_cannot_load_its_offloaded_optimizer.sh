#!/bin/bash
# megatron-core 0.16.1: a distributed checkpoint of an optimiser that is offloaded to the CPU is saved, but not loaded.
#
# With optimizer_cpu_offload the inner optimiser is a HybridDeviceOptimizer. Its param_groups hold the classes of the
# optimisers for CPU and GPU. dist_checkpointing.save writes the groups, with these classes, into common.pt.
# dist_checkpointing.load reads this file with torch.load. Since torch 2.6 torch.load accepts only registered classes by
# default, and Megatron registers neither of the two. So training and saving work, and a resume ends in an error. If the
# classes are removed before the save, the checkpoint is loaded. A user reports a failed resume from GPUs
# (NVIDIA-NeMo/RL, issue 1553).
#
# The probe needs no GPU. Tensors for the GPU lie in host memory, and their `is_cuda` is true. The settings are those of
# Megatron's documentation of the offload, without pinned gradients. Exits 0 as long as megatron-core does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 megatron-core==0.16.1 numpy==1.26.4 psutil==7.1.3
cat > "$folder/probe.py" <<'PROBE'
import logging
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, optimizer_config
from megatron.core.transformer import TransformerConfig

OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0, "use_precision_aware_optimizer": True}
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}


class WithoutGpu(torch.overrides.TorchFunctionMode):
    """Makes tensors for the GPU on the CPU. They and their views say that they are on the GPU, as does their type."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = set()

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function == torch.Tensor.is_cuda.__get__:
            return arguments[0].untyped_storage().data_ptr() in self.memory
        if function == torch.Tensor.pin_memory:
            return arguments[0]
        for_gpu = str(options.get("device", "")).startswith("cuda")
        if for_gpu:
            options["device"] = "cpu"
        result = function(*arguments, **options)
        if for_gpu:
            self.memory.add(result.untyped_storage().data_ptr())
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Parameter(torch.arange(1.0, 9.0, dtype=torch.bfloat16))

    def sharded(self) -> dict:
        return {"layer": ShardedTensor.from_rank_offsets("layer", self.layer, replica_id=0)}


def train_one_step():
    model = Model()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    settings = {"optimizer": "adam", "lr": 0.5, "bf16": True, "use_distributed_optimizer": True, "pin_cpu_grads": False}
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings, **OFFLOAD), [wrapped])
    model.layer.main_grad.fill_(1.0)
    optimizer.step()
    return model, optimizer


def classes_in(group: dict) -> list[str]:
    return [name for name, value in group.items() if isinstance(value, type)]


def print_load(title: str, model, optimizer, checkpoint: Path, *, without_classes: bool = False) -> None:
    state = optimizer.sharded_state_dict(model.sharded(), metadata=SHARDING)
    (group,) = state["optimizer"]["param_groups"]
    if without_classes:
        for name in classes_in(group):
            del group[name]
    checkpoint.mkdir()
    dist_checkpointing.save({"optimizer": state}, checkpoint)
    print(f"{title}: classes in param_groups: {classes_in(group)}")
    wanted = optimizer.sharded_state_dict(model.sharded(), is_loading=True, metadata=SHARDING)
    try:
        optimizer.load_state_dict(dist_checkpointing.load({"optimizer": wanted}, checkpoint)["optimizer"])
        print("  loaded")
    except Exception as error:
        refused = re.search(r"Unsupported global: GLOBAL \S+", str(error))
        print(f"  {type(error).__name__}: {refused.group() if refused else error}")


if __name__ == "__main__":
    print("megatron-core", version("megatron-core"))
    torch.cuda.current_device, torch.cuda.synchronize = lambda: torch.device("cuda"), lambda *_: None
    torch.cuda.current_stream = MagicMock()
    optimizer_config.is_te_min_version = lambda _: False  # without Transformer Engine the library's own one fails
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
    folder = Path(sys.argv[1])
    folder.mkdir()
    with WithoutGpu():
        trained = train_one_step()
        print_load("as it is", *trained, folder / "as_it_is")
        print_load("without the classes", *trained, folder / "without_classes", without_classes=True)
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder/checkpoints" 2> "$folder/messages" | tee "$folder/seen" \
    || { cat "$folder/messages"; exit 1; }
cat > "$folder/expected" <<'SEEN'
megatron-core 0.16.1
as it is: classes in param_groups: ['cpu_optimizer_cls', 'gpu_optimizer_cls']
  UnpicklingError: Unsupported global: GLOBAL torch.optim.adamw.AdamW
without the classes: classes in param_groups: []
  loaded
SEEN
diff "$folder/expected" "$folder/seen"
