#!/bin/bash
# megatron-core 0.16.1: the distributed optimiser stores wrong values of parameters that are behind a padded bucket.
#
# For a checkpoint that any layout can load (sharding type "fully_reshardable"), the optimiser joins its buckets without
# the padding between them. Then it cuts out each parameter at its offset in the padded buffer. A shared embedding has a
# bucket of its own, in front of the other parameters. If its size is not a multiple of the padding, all parameters behind
# it are stored shifted by the padding: float32 main weights and both moments. What is beyond the end becomes zeros, for
# which there is a log line. A load puts these values into the model without an error.
#
# The probe stores the parameter `layer` (1 to 8) behind an embedding of 128 and of 100 numbers.
# Exits 0 as long as megatron-core does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 megatron-core==0.16.1 numpy==1.26.4 psutil==7.1.3
cat > "$folder/probe.py" <<'PROBE'
import logging
import warnings
from importlib.metadata import version

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig


class WithoutGpu(torch.overrides.TorchFunctionMode):
    """Makes tensors for the GPU on the CPU, and names their type as the library expects it."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        result = function(*arguments, **options)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result


class Model(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = torch.nn.Parameter(torch.arange(1.0, 9.0))
        self.embedding = torch.nn.Parameter(torch.full((size,), -1.0))
        self.embedding.shared_embedding = True

    def sharded(self) -> dict:
        return {name: ShardedTensor.from_rank_offsets(name, p, replica_id=0) for name, p in self.named_parameters()}


def print_stored(size: int) -> None:
    model = Model(size)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=0.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [wrapped]).chained_optimizers[0]
    optimizer._init_optimizer_states_with_dummy_values()
    metadata = {"distrib_optim_fully_reshardable_mem_efficient": True}
    for entry in optimizer.sharded_param_state_fully_reshardable(model.sharded(), metadata=metadata).values():
        if entry["param"].key.endswith("layer"):
            print(f"behind {size} numbers, stored:", entry["param"].data.tolist())


print("megatron-core", version("megatron-core"))
torch.cuda.current_device = lambda: torch.device("cpu")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
with WithoutGpu():
    print_stored(128)
    print_stored(100)
PROBE
"$folder/venv/bin/python" "$folder/probe.py" 2> "$folder/messages" | tee "$folder/seen" \
    || { cat "$folder/messages"; exit 1; }
cat > "$folder/expected" <<'SEEN'
megatron-core 0.16.1
behind 128 numbers, stored: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
behind 100 numbers, stored: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
SEEN
diff "$folder/expected" "$folder/seen"
