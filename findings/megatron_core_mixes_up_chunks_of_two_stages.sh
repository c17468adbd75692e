#!/bin/bash
# megatron-core 0.16.1: two pipeline stages with chunks swap activations and gradients with the default p2p settings.
#
# In the interleaved schedule, each of two stages is both the previous and the next stage of the other one. With the
# defaults (overlap_p2p_comm=False, batch_p2p_comm=True) a stage sends a gradient and an activation in one batch. Only
# their order tells them apart: the sender starts with the gradient, but the receiver starts with the activation. If all
# micro-batches have one shape, losses and gradients are wrong without an error. Megatron-LM's training script refuses
# these settings for two stages, but megatron.core does not. Set overlap_p2p_comm=True and batch_p2p_comm=False. Seen
# with gloo on a CPU.
#
# The probe has four chunks on two stages. Each chunk computes weight * x + 10. One process without a pipeline is the
# reference. Exits 0 as long as megatron-core does so.
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
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

WEIGHTS = (2.0, 3.0, 5.0, 7.0)  # stage 0 has the chunks 0 and 2, stage 1 has the chunks 1 and 3
MICRO_BATCHES = [torch.full((1, 1, 1), value) for value in (1.0, 3.0, 5.0, 7.0)]
STAGES = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


class Chunk(torch.nn.Module):
    model_type = ModelType.encoder_or_decoder

    def __init__(self, weight: float, config: TransformerConfig | None = None) -> None:
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.tensor(weight)), config

    def set_input_tensor(self, received: list) -> None:
        self.received = received[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x + 10


def print_found(title: str, losses: list[float], gradients: list[float]) -> None:
    print(f"{title}:\n  losses {losses}\n  gradients {gradients}", flush=True)


def run_without_pipeline() -> None:
    model = torch.nn.Sequential(*map(Chunk, WEIGHTS))
    losses = [model(batch).sum() for batch in MICRO_BATCHES]
    (sum(losses) / len(losses)).backward()
    print_found("one process", [loss.item() for loss in losses], [chunk.weight.grad.item() for chunk in model])


def forward_step(batches, chunk: Chunk):
    output = chunk(next(batches) if chunk.received is None else chunk.received)
    return output, lambda output: (output.sum(), output.item())


def run_stage(stage: int, folder: str) -> None:
    make_zeros = torch.zeros  # the library makes a tensor for the GPU, and asks for the current GPU
    torch.zeros = lambda *sizes, device=None, **options: make_zeros(*sizes, **options)
    torch.cuda.current_device, torch.cuda.synchronize = lambda: torch.device("cpu"), lambda *_: None
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=stage, world_size=2)
    parallel_state.initialize_model_parallel(**STAGES)
    size = {"num_layers": 4, "hidden_size": 1, "num_attention_heads": 1, "pipeline_dtype": torch.float32}
    for settings in ({"overlap_p2p_comm": True, "batch_p2p_comm": False}, {}):  # then the defaults
        config = TransformerConfig(**size, **STAGES, **settings)
        chunks = [Chunk(weight, config) for weight in WEIGHTS[stage::2]]
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(MICRO_BATCHES) for _ in chunks],
            model=chunks,
            num_microbatches=len(MICRO_BATCHES),
            seq_length=1,
            micro_batch_size=1,
        )
        found = [None, None]
        dist.all_gather_object(found, (losses, [chunk.weight.grad.item() for chunk in chunks]))
        if stage == 0:
            (_, even), (losses, odd) = found
            title = f"two stages, overlap_p2p_comm={config.overlap_p2p_comm}, batch_p2p_comm={config.batch_p2p_comm}"
            print_found(title, losses, [even[0], odd[0], even[1], odd[1]])
    dist.destroy_process_group()


if __name__ == "__main__":
    print("megatron-core", version("megatron-core"))
    run_without_pipeline()
    mp.spawn(run_stage, (sys.argv[1],), nprocs=2)
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/messages" | tee "$folder/seen" \
    || { cat "$folder/messages"; exit 1; }
cat > "$folder/expected" <<'SEEN'
megatron-core 0.16.1
one process:
  losses [1690.0, 2110.0, 2530.0, 2950.0]
  gradients [420.0, 630.0, 448.0, 330.0]
two stages, overlap_p2p_comm=True, batch_p2p_comm=False:
  losses [1690.0, 2110.0, 2530.0, 2950.0]
  gradients [420.0, 630.0, 448.0, 330.0]
two stages, overlap_p2p_comm=False, batch_p2p_comm=True:
  losses [1690.0, 2110.0, 2180.0, 2600.0]
  gradients [460.0, 777.125, 413.0, 305.0]
SEEN
diff "$folder/expected" "$folder/seen"
