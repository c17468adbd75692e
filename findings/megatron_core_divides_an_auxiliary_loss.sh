#!/bin/bash
# megatron-core 0.16.1: with calculate_per_token_loss the auxiliary loss of a router is divided by the tensor-parallel size.
#
# With that setting the loss is a sum over tokens, and the gradients are divided by the number of all tokens at the end. So
# a router multiplies its auxiliary loss by its tokens. With sequence parallelism it takes the tokens of its own rank, not
# those of the tensor-parallel group over which the auxiliary loss is computed. At tensor parallel 2 the coefficient is
# half of what was set, without a message. Without calculate_per_token_loss it is right. Multiply moe_aux_loss_coeff by
# the tensor-parallel size. Seen with gloo on a CPU.
#
# The probe prints the norm of the auxiliary loss's gradient for a router's weight. Exits 0 as long as megatron-core does so.
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
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module

TOKENS, HIDDEN = 6, 8


def fill(layer: torch.nn.Module) -> None:
    """The same weights on each rank."""
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))


def gradient(rank: int, world: int, *, per_token: bool) -> float:
    """The norm of the auxiliary loss's gradient at the router's weight, summed over the tensor-parallel ranks."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=4,
        add_bias_linear=False,
        num_moe_experts=2,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1.0,
        calculate_per_token_loss=per_token,
        tensor_model_parallel_size=world,
        expert_tensor_parallel_size=1,
        sequence_parallel=world > 1,
        use_cpu_initialization=True,
    )
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=2, moe_grouped_gemm=False), config=config)
    fill(layer)
    tokens = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(99))
    output, _ = layer(tokens.chunk(world)[rank])  # sequence parallel: each rank has half of the tokens
    (0.0 * output.sum()).backward()  # the auxiliary loss alone
    gradient = layer.router.weight.grad
    dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient.norm().item()


def run(rank: int, world: int, folder: str) -> None:
    moe_utils.te_general_gemm = None  # without Transformer Engine the library reads this name and does not define it
    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world, expert_tensor_parallel_size=1)
    for per_token in (False, True):
        norm = gradient(rank, world, per_token=per_token)
        if per_token:
            norm /= TOKENS  # the gradients' finalizer divides by the number of all tokens
        if rank == 0:
            print(f"tensor parallel {world}, calculate_per_token_loss={per_token}: {norm:.4f}", flush=True)


if __name__ == "__main__":
    print("megatron-core", version("megatron-core"))
    for world in (1, 2):
        mp.spawn(run, (world, sys.argv[1]), nprocs=world)
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/messages" | tee "$folder/seen" \
    || { cat "$folder/messages"; exit 1; }
cat > "$folder/expected" <<'SEEN'
megatron-core 0.16.1
tensor parallel 1, calculate_per_token_loss=False: 0.1414
tensor parallel 1, calculate_per_token_loss=True: 0.1414
tensor parallel 2, calculate_per_token_loss=False: 0.1414
tensor parallel 2, calculate_per_token_loss=True: 0.0707
SEEN
diff "$folder/expected" "$folder/seen"
