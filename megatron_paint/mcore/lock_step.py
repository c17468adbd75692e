"""Replicas that share the experts of a mixture sample together: each runs the same number of forward calls.

A layer of experts is a collective of these replicas. A replica that has sampled its responses continues with calls of
padding until the others have theirs.
"""

import torch
import torch.distributed as dist


class LockStep:
    """The calls of one sampling. Before every `every`-th call the replicas agree on whether one of them has work.

    group: all ranks of these replicas, over gloo; None: the replica shares no experts, and nothing is agreed on.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, every: int) -> None:
        self._group, self._every = group, every
        self._agreed = 0  # calls that all replicas will still run

    def begin_call(self) -> None:
        """Must be called before each forward call."""
        if self._group is None:
            return
        if self._agreed == 0:
            self._agree(has_work=True)
        self._agreed -= 1

    def others_work(self) -> bool:
        """Whether a replica without work must run another call for the others."""
        return self._group is not None and (self._agreed > 0 or self._agree(has_work=False))

    def _agree(self, *, has_work: bool) -> bool:
        working = torch.tensor(int(has_work))
        dist.all_reduce(working, op=dist.ReduceOp.MAX, group=self._group)
        self._agreed = self._every * int(working)
        return self._agreed > 0
