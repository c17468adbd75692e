"""What the checks ask of the machine: a test puts its own answers in."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_paint.launch.preflight import collective, gpus, packages


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The real ones by default."""

    clock: Callable[[], float] = time.time
    versions: Callable[[], dict[str, str]] = packages.versions
    statvfs: Callable[[str], os.statvfs_result] = os.statvfs
    gpus: Callable[[], int] = gpus.visible
    contribution: Callable[[int], float] = collective.own_part
