"""Two ranks whose clocks differ. Prints the offsets that each has found, as JSON."""

import json
import time
from dataclasses import asdict

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.mcore import clocks
from megatron_paint.mcore.ranks import start_ranks, stop_ranks

AHEAD = 1234.5  # seconds, of the clock of odd ranks


def main() -> None:
    ranks = start_ranks(MegatronSettings())
    found = {"one machine": clocks.clock_offsets(ranks)}
    if ranks.rank % 2:
        read = time.perf_counter
        clocks.time.perf_counter = lambda: read() + AHEAD
        clocks.clock_id = lambda: "another machine"
    found["two machines"] = clocks.clock_offsets(ranks)
    print(json.dumps({case: {r: asdict(offset) for r, offset in of.items()} for case, of in found.items()}))
    stop_ranks()
