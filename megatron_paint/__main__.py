"""`megatron-paint`, which is `python -m megatron_paint`: runs a command and ends the process."""

import os
import sys
import traceback

from megatron_paint.cli import main
from megatron_paint.launch.local import inside_a_world


def run() -> None:
    """Ends the process with the command's status; a rank that failed ends at once.

    Its process groups are still up, and an exit of Python's own takes them down: it waits for ranks that are gone, or
    aborts (about one exit in thirty over gloo).
    """
    if not inside_a_world():
        sys.exit(main())
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    run()
