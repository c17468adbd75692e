"""`megatron-paint`, which is `python -m megatron_paint`: runs a command and ends the process."""

import os
import sys
import traceback

from megatron_paint.cli.main import main


def run() -> None:
    """Ends the process with the command's status; where it failed, at once.

    A rank's process groups are still up then, and an exit of Python's own takes them down: it waits for ranks that are
    gone, or aborts (about one exit in thirty over gloo; three in four where a thread is writing a checkpoint).
    """
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
