#!/bin/bash
# torch 2.13.0, gloo: every process group has a thread that wakes up about a hundred times a second, also if it is idle.
#
# A process with many groups (Megatron-Core makes 40 to 50 a rank) spends CPU time on nothing: tests of several ranks on few
# cores feel it. Here 20 groups of one rank are idle for three seconds.
#
# Exits 0 as long as torch does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat > "$folder/probe.py" <<'PROBE'
import glob
import sys
import time

import torch
import torch.distributed as dist

GROUPS, SECONDS = 20, 3


def polling():
    """Wake-ups so far of each thread that polls."""
    found = {}
    for task in glob.glob("/proc/self/task/*"):
        if open(f"{task}/comm").read().strip() == "gloo_tcp_loop":
            lines = open(f"{task}/status").read().splitlines()
            found[task] = int(next(line for line in lines if line.startswith("voluntary_ctxt")).split()[1])
    return found


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=0, world_size=1)
for _ in range(GROUPS - 1):
    dist.new_group([0])
time.sleep(1)  # the threads name themselves
before = polling()
time.sleep(SECONDS)
after = polling()
rates = [(after[task] - before[task]) / SECONDS for task in before]
print("torch", torch.__version__.split("+")[0])
print(len(rates), "polling threads for", GROUPS, "groups")
print("each wakes up more than 50 times a second:", min(rates) > 50)
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
cat > "$folder/expected" <<'SEEN'
torch 2.13.0
20 polling threads for 20 groups
each wakes up more than 50 times a second: True
SEEN
diff "$folder/expected" "$folder/seen"
