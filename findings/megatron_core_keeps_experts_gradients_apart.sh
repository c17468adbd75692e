#!/bin/bash
# megatron-core 0.16.1: with tensor parallelism over complete experts, no collective adds up the experts' gradients.
#
# The layout is tensor parallel 2 with sequence parallelism, expert parallel 1 and expert tensor parallel 1. Both ranks
# have all experts, and each sends its half of the tokens through them. An expert's weight gets the mark allreduce=True
# whenever expert parallelism is 1, so DistributedDataParallel reduces its gradient over the data-parallel ranks. Here
# that is one rank. Each copy keeps the gradient of its own tokens, without an error, and the copies drift apart. Set
# allreduce=False on the parameters of experts before they are wrapped. Seen with gloo on a CPU.
#
# The probe prints the norm of one expert's gradient on each rank. One rank is the reference. Exits 0 as long as
# megatron-core does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 megatron-core==0.16.1 numpy==1.26.4 psutil==7.1.3
cat > "$folder/probe.py" <<'PROBE'
import logging
import sys
import warnings
from importlib.metadata import version

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module

TOKENS, HIDDEN = 6, 8


def fill(layer: torch.nn.Module) -> None:
    """The same weights on each rank."""
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))


def gradient(rank: int, world: int, *, marked: bool) -> float:
    """The norm of the gradient of an expert's weight, after the reduction. marked: experts have allreduce=False."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=4,
        add_bias_linear=False,
        num_moe_experts=2,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        tensor_model_parallel_size=world,
        expert_tensor_parallel_size=1,
        sequence_parallel=world > 1,
        use_cpu_initialization=True,
    )
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=2, moe_grouped_gemm=False), config=config)
    fill(layer)
    if marked:
        for parameter in layer.experts.parameters():
            parameter.allreduce = False
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), layer)
    tokens = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(99))
    output, _ = wrapped(tokens.chunk(world)[rank])  # sequence parallel: each rank has half of the tokens
    output.sum().backward()
    wrapped.finish_grad_sync()
    return round(layer.experts.local_experts[0].linear_fc2.weight.main_grad.norm().item(), 4)


def run(rank: int, world: int, folder: str) -> None:
    moe_utils.te_general_gemm = None  # without Transformer Engine the library reads this name and does not define it
    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world, expert_tensor_parallel_size=1)
    for name, marked in (("as built", False), ("marked", True)):
        mine = torch.tensor(gradient(rank, world, marked=marked))
        found = [torch.zeros_like(mine) for _ in range(world)]
        dist.all_gather(found, mine)
        if rank == 0:
            print(f"tensor parallel {world}, {name}: {[round(norm.item(), 4) for norm in found]}", flush=True)


if __name__ == "__main__":
    print("megatron-core", version("megatron-core"))
    for world in (1, 2):
        mp.spawn(run, (world, sys.argv[1]), nprocs=world)
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/messages" | tee "$folder/seen" \
    || { cat "$folder/messages"; exit 1; }
cat > "$folder/expected" <<'SEEN'
megatron-core 0.16.1
tensor parallel 1, as built: [18.3022]
tensor parallel 1, marked: [18.3022]
tensor parallel 2, as built: [18.2652, 0.0617]
tensor parallel 2, marked: [18.3022, 18.3022]
SEEN
diff "$folder/expected" "$folder/seen"
