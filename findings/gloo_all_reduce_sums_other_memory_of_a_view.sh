#!/bin/bash
# torch 2.13.0, gloo: `all_reduce` of a view with gaps between its rows sums other numbers, without an error.
#
# Of a 2 x 5 tensor the view of the first three columns is summed over two ranks. Gloo takes the first six numbers of the
# memory instead: two numbers beside the view are summed, and two of the view are not. NCCL refuses such a tensor. Make a
# view contiguous before a collective.
#
# Exits 0 as long as torch does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat > "$folder/probe.py" <<'PROBE'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def summed(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole = torch.arange(10).view(2, 5) + 100 * rank
    view = whole[:, :3]
    dist.all_reduce(view)
    if rank == 0:
        print("the view", view.tolist())
        print("its tensor", whole.tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__.split("+")[0])
    print("expected", [[100, 102, 104], [110, 112, 114]], flush=True)
    mp.spawn(summed, (sys.argv[1],), nprocs=2)
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
cat > "$folder/expected" <<'SEEN'
torch 2.13.0
expected [[100, 102, 104], [110, 112, 114]]
the view [[100, 102, 104], [110, 6, 7]]
its tensor [[100, 102, 104, 106, 108], [110, 6, 7, 8, 9]]
SEEN
diff "$folder/expected" "$folder/seen"
