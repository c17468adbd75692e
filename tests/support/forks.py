"""The end of a forked process."""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn


def end_after(call: Callable[[], object]) -> NoReturn:
    """Calls, and ends this process with the status that Python would end it with.

    Waits for threads and runs exit functions as Python does. Leaves out the taking down of imported modules, which
    takes a second of CPU time for those of torch and Megatron.
    """
    status = 0
    try:
        call()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
