"""Ranks on two nodes connect over the network, and training there equals training on one machine."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLOCK = ("time/", "memory/", "tokens_per_second")  # metrics of how fast, not of what
MINUTES = 600.0  # several processes import torch at once, on a machine with few cores
HEAD = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --cpus-per-task=12 --gpus-per-node=2 --mem=64G
"""
PLACE = """
set -euo pipefail
export MASTER_ADDR=$(getent hosts "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" | cut -d' ' -f1)
export MASTER_PORT=29500
export OMP_NUM_THREADS=1
"""
RANKS = {
    "torchrun": f"""
srun --ntasks=2 --ntasks-per-node=1 {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=2 \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" """,
    "srun": f"""
export WORLD_SIZE=4
srun bash -c \\
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank {sys.executable} """,
}
SETTINGS = ("examples/quickstart/paint.yaml", "run.steps=2", "evaluation.problems=null", "run.tensorboard=false")
TRAIN = f"srun {sys.executable} -m megatron_paint train {' '.join(SETTINGS)}"


@pytest.mark.parametrize("launcher", RANKS)
def test_gloo_adds_up_over_two_nodes(cluster, launcher):
    job = cluster.submit(HEAD + PLACE + RANKS[launcher] + str(ROOT / "tests/slurm/all_reduce.py"))
    job.wait("COMPLETED", seconds=MINUTES)
    printed = sorted(line.split() for line in job.output().splitlines() if line[:2] in job.nodes())
    assert printed == [[node, rank, "10.0"] for node in job.nodes() for rank in "01"]
    assert len(job.nodes()) == 2


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_on_two_nodes_equals_training_on_one_machine(cluster, tmp_path):
    """TP 2 x PP 2: every tensor-parallel pair is on one node, the pipeline's stages are on two."""
    two, one = tmp_path / "two", tmp_path / "one"
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = f"{HEAD}{TRAIN} run.dir={two}\n"
    job = cluster.submit(script, f"--output={tmp_path / 'job.out'}", cwd=ROOT, env=environment)
    job.wait("COMPLETED", seconds=MINUTES)
    assert len(job.nodes()) == 2
    here = [sys.executable, "-m", "megatron_paint", "train", *SETTINGS, f"run.dir={one}", "--processes", "4"]
    done = subprocess.run(here, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=MINUTES)
    assert done.returncode == 0, done.stderr
    steps = list(zip(metrics(two), metrics(one), strict=True))
    assert len(steps) == 2
    for distributed, local in steps:
        assert distributed.keys() == local.keys()
        for name in filter(lambda name: not name.startswith(CLOCK), local):
            assert math.isclose(distributed[name], local[name], rel_tol=1e-6), (name, distributed[name], local[name])
