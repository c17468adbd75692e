"""`megatron-paint`, also `python -m megatron_paint`: runs a command and ends the process."""

import atexit
import os
import sys
import traceback
from contextlib import suppress


def run() -> None:
    """Runs the command and ends the process with its status, without Python's own teardown.

    After a failure a rank's process groups still exist, and Python's teardown would wait for ranks that are gone, or
    abort (one exit in thirty over gloo, three in four while a thread writes a checkpoint). After a success the teardown
    of torch and Megatron only takes time: up to seconds between the last line and the prompt. Threads, and functions
    that libraries registered for the exit, are finished first.
    """
    status: list[int] = []
    atexit.register(_end_process, status)  # before any library registers a function: so this one is called last
    from megatron_paint.cli.main import main

    try:
        status.append(main())
    except Exception:
        traceback.print_exc()
        status.append(1)
    if status[0]:
        _end_process(status)
    sys.exit()


def _end_process(status: list[int]) -> None:
    """Ends the process with the command's status, if it has one: argparse ends `--help` itself."""
    if status:
        os._exit(_flush_output() or status[0])


def _flush_output() -> int:
    """0, or 120 where the output cannot be written, which is Python's own exit status for it."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        with suppress(OSError):
            os.write(2, f"megatron-paint: error: the output cannot be written: {error}\n".encode())
        return 120
    return 0


if __name__ == "__main__":
    run()
