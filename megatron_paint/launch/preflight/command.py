"""One process of the preflight: from its arguments to its exit status."""

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from megatron_paint.base.errors import UserError
from megatron_paint.launch.preflight.coordinator import run_coordinator
from megatron_paint.launch.preflight.identity import find_node
from megatron_paint.launch.preflight.options import parse
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.report import report_results
from megatron_paint.launch.preflight.time_limit import IMPORT_SECONDS, TimeLimit
from megatron_paint.launch.preflight.timed_process import end_all
from megatron_paint.launch.preflight.worker import run_worker

MISTAKE = 2


def main(arguments: Sequence[str] | None = None, probes: Probes | None = None) -> int:
    """Runs the checks and returns the exit status.

    0: every check passed; 2: a mistake on the command line; 3: a check failed; 128 + signal: a signal ended it.
    probes: a test's answers in place of the machine's.
    """
    # torch's store prints two things on stderr that are answers here: nobody listens yet, or the first node is gone.
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
    limit.restart(options.limit_seconds)
    limit.phase = "the start"
    received: list[int] = []
    signal.signal(signal.SIGTERM, partial(_end, received))
    probes = probes or Probes()
    try:
        if me.rank == 0:
            status = run_coordinator(
                options, me, probes, limit, lambda state: report_results(state, options, limit.elapsed)
            )
        else:
            status = run_worker(options, me, probes, limit)
        return 128 + received[0] if received else status  # Python drops an exception that is raised during a fork
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as error:  # of _end
        return int(error.code or 0)
    finally:
        end_all()


def import_all() -> None:
    """Imports what the checks need. From a cold shared disk this may take a minute, and no node is to blame for it."""
    import torch.distributed  # noqa: F401

    import megatron_paint.config.load
    import megatron_paint.planning.memory  # noqa: F401


def _end(received: list[int], number: int, _: object) -> None:
    """Ends the process through its clean-up, which removes for example the token. A second signal does not interrupt
    the clean-up."""
    received.append(number)
    if len(received) == 1:
        raise SystemExit(128 + number)
