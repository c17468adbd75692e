"""What the checks ask the machine, and how long they wait for its disk. A test replaces these."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_paint.launch.preflight import collective, gpus, packages, shared


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The defaults ask the real machine."""

    clock: Callable[[], float] = time.time
    versions: Callable[[], dict[str, str]] = packages.versions
    statvfs: Callable[[str], os.statvfs_result] = os.statvfs
    gpus: Callable[[], int] = gpus.visible
    contribution: Callable[[int], float] = collective.own_part
    patience: float = shared.PATIENCE  # seconds until a network file system shows what another node wrote
