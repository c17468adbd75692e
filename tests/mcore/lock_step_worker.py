"""Two replicas with different work in lock-step; each writes the number of calls that it ran."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_paint.mcore.lock_step import LockStep

WORK = ((3, 5), (5, 3), (0, 4), (4, 4), (0, 0), (16, 17))
EVERY = (1, 4)


def calls(work: int, every: int) -> int:
    step, count = LockStep(dist.group.WORLD, every=every), 0
    while count < work or step.others_work():
        step.begin_call()
        count += 1
    return count


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = [[calls(work[rank], every) for work in WORK] for every in EVERY]
    Path(sys.argv[1], f"calls{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
