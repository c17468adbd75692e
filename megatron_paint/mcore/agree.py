"""One rank acts for all: its result, or its error, reaches every rank."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_paint.errors import UserError
from megatron_paint.mcore.world import World

T = TypeVar("T")


def first_rank_does(world: World, act: Callable[[], T]) -> T:
    """What `act` gives on rank 0, on all ranks; where it raises a UserError, all ranks raise it."""
    box: list[object] = [None, None]
    if world.rank == 0:
        try:
            box[0] = act()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=world.host_group)
    if box[1] is not None:
        raise UserError(str(box[1]))
    return box[0]
