"""One process of the preflight, from its arguments to its exit status."""

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.coordinator import lead
from megatron_paint.launch.preflight.identity import find_node
from megatron_paint.launch.preflight.options import parse
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.report import conclude
from megatron_paint.launch.preflight.time_limit import IMPORT_SECONDS, TimeLimit
from megatron_paint.launch.preflight.timed_process import end_all
from megatron_paint.launch.preflight.worker import follow

MISTAKE = 2


def main(arguments: Sequence[str] | None = None, probes: Probes | None = None) -> int:
    """Runs the checks; 0: all is well; 2: a mistake on the command line; 3: a check failed; 128 + signal: ended by it.

    probes: a test's answers in place of the machine's.
    """
    # torch's store says on stderr what is an answer here: that nobody listens yet, or that the first node has gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        me = find_node(
            os.environ,
            rank=options.node_rank,
            count=options.nodes,
            name=options.node_name,
            names=options.node_names,
        )
    except UserError as error:
        print(f"preflight: error: {error}", file=sys.stderr)
        return MISTAKE
    limit = TimeLimit(IMPORT_SECONDS, me.name, "the import of torch")
    limit.enforce()
    import_all()
    limit.begin(options.limit_seconds)
    limit.phase = "the start"
    told: list[int] = []
    signal.signal(signal.SIGTERM, partial(_end, told))
    probes = probes or Probes()
    try:
        if me.rank == 0:
            status = lead(options, me, probes, limit, lambda case: conclude(case, options, limit.elapsed))
        else:
            status = follow(options, me, probes, limit)
        return 128 + told[0] if told else status  # Python drops what is raised while it forks
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as error:  # of _end
        return int(error.code or 0)
    finally:
        end_all()


def import_all() -> None:
    """Imports what the checks need: from a cold shared disk that may take a minute, for which no node is to blame."""
    import torch.distributed  # noqa: F401

    import megatron_paint.config.load
    import megatron_paint.planning.memory  # noqa: F401


def _end(told: list[int], number: int, _: object) -> None:
    """Lets what must be taken back, such as the token, be taken back on the way out, which no second one interrupts."""
    told.append(number)
    if len(told) == 1:
        raise SystemExit(128 + number)
