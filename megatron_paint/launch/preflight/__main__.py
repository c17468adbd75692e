"""`python -m megatron_paint.launch.preflight`: start one such process on each node."""

import os
import sys

from megatron_paint.launch.preflight.command import main


def run() -> None:
    """Ends the process with the status of the checks.

    It uses `os._exit`: Python's own exit would wait for a child that hangs in a driver or on a dead file system.
    """
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
