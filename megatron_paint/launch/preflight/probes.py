"""The questions that the checks ask the machine. A test replaces the answers."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_paint.launch.preflight import collective, gpus, packages


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The defaults ask the real machine."""

    clock: Callable[[], float] = time.time
    versions: Callable[[], dict[str, str]] = packages.versions
    statvfs: Callable[[str], os.statvfs_result] = os.statvfs
    gpus: Callable[[], int] = gpus.visible
    contribution: Callable[[int], float] = collective.own_part
