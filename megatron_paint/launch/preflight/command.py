"""One process of the preflight, from its arguments to its exit status."""

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from megatron_paint.errors import UserError
from megatron_paint.launch.preflight.errand import end_all
from megatron_paint.launch.preflight.follow import follow
from megatron_paint.launch.preflight.identity import find_node
from megatron_paint.launch.preflight.lead import lead
from megatron_paint.launch.preflight.options import parse
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.time_limit import TimeLimit
from megatron_paint.launch.preflight.verdict import conclude

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
    limit = TimeLimit(options.limit_seconds, me.name)
    limit.enforce()
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


def _end(told: list[int], number: int, _: object) -> NoReturn:
    """Lets what must be taken back, such as the token, be taken back on the way out."""
    told.append(number)
    raise SystemExit(128 + number)
