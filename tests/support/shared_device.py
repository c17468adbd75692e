"""One gloo device for all process groups of a process.

torch makes a device for each group, and each has a thread that wakes up a hundred times a second. Megatron makes dozens
of groups a rank: on two cores the threads of four ranks take an eighth of a core, and delay the ranks.
"""

import os
from datetime import timedelta

from torch.distributed import ProcessGroupGloo, Store

_own: dict[int, ProcessGroupGloo.Device] = {}  # by process id: a fork has none of its parent's threads


def share_gloo_device() -> None:
    """Lets every gloo group that this process and its forks make use one device a process."""
    make = ProcessGroupGloo.__init__

    def share(self: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta, **more: object) -> None:
        if more:  # torch 2.14 has an option that takes the place of these options: each group has its device there
            return make(self, store, rank, size, timeout=timeout, **more)
        options = ProcessGroupGloo._Options()
        if os.getpid() not in _own:
            _own[os.getpid()] = ProcessGroupGloo.create_default_device()
        options._devices, options._timeout, options._threads = [_own[os.getpid()]], timeout, 2
        return make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = share
