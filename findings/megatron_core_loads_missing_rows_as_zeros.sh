#!/bin/bash
# megatron-core 0.16.1: a checkpoint with fewer rows than the model loads without an error, and the missing rows are zeros.
#
# Embedding and output layer are marked with allow_shape_mismatch, so that a vocabulary that was padded for another
# tensor-parallel size can be loaded. The mark accepts fewer rows as well as more. With a checkpoint of a smaller
# vocabulary the last rows of the model become zeros, whatever they were before, and no warning is printed. Without the
# mark the same load raises an error.
#
# Exits 0 as long as megatron-core does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 megatron-core==0.16.1 numpy==1.26.4 psutil==7.1.3
cat > "$folder/probe.py" <<'PROBE'
import logging
import os
import sys
import warnings
from importlib.metadata import version

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor


def embedding(rows: int, value: float, **options) -> dict:
    """A state dictionary with an embedding of so many rows."""
    weight = torch.full((rows, 2), value)
    return {"embedding": ShardedTensor.from_rank_offsets("embedding", weight, replica_id=0, **options)}


if __name__ == "__main__":
    print("megatron-core", version("megatron-core"))
    if not torch.cuda.is_available():  # the library asks for the current GPU
        torch.cuda.synchronize = lambda *_: None
        torch.cuda.current_device = lambda: torch.device("cpu")
    os.makedirs(sys.argv[1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist_checkpointing.save(embedding(3, 1.0), sys.argv[1])
    try:
        dist_checkpointing.load(embedding(5, 7.0), sys.argv[1])
    except BaseException as error:
        print("without the mark:", type(error).__name__)
    loaded = dist_checkpointing.load(embedding(5, 7.0, allow_shape_mismatch=True), sys.argv[1])
    print("with the mark:", loaded["embedding"].tolist())
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder/checkpoint" 2> "$folder/messages" | tee "$folder/seen" \
    || { cat "$folder/messages"; exit 1; }
cat > "$folder/expected" <<'SEEN'
megatron-core 0.16.1
without the mark: CheckpointException
with the mark: [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
SEEN
diff "$folder/expected" "$folder/seen"
