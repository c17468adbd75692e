"""How a worker process talks with the pool that started it: questions on stdin, replies on stdout, one JSON a line.

The first line that a worker writes is {"ready": true}, or {"unusable": REASON} if it can answer no question.
"""

import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

OWNER_PIPE = "MEGATRON_PAINT_WORKER_PIPE"  # variable with the descriptor of a pipe that ends with the pool's process
Answer = Callable[[dict[str, Any]], dict[str, Any]]  # question -> reply


def serve(prepare: Callable[[], Answer], *, memory_bytes: int | None) -> None:
    """Answers questions until stdin ends.

    prepare: does the imports and returns what answers a question. An ImportError of it makes the worker unusable; its
    text is the reason. Its time does not count against the first question. memory_bytes: limit on the address space;
    None: no limit. What is printed meanwhile is dropped, and nothing can read the questions from stdin.
    """
    _end_with_owner()
    logging.disable(logging.CRITICAL)
    questions = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    null_device = os.open(os.devnull, os.O_RDWR)
    os.dup2(null_device, 0)
    os.dup2(null_device, 1)
    sys.stdout.reconfigure(errors="backslashreplace")  # printing broken Unicode is no error
    try:
        answer = prepare()
    except ImportError as error:
        replies.write(json.dumps({"unusable": str(error)}) + "\n")
        return
    os.dup2(null_device, 2)  # a parser prints a warning for every odd character
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies.write(json.dumps({"ready": True}) + "\n")
    worker = os.getpid()
    for line in questions:
        question = json.loads(line)
        # The alarm's default action ends the process even inside C code, so no worker runs on without its parent.
        signal.setitimer(signal.ITIMER_REAL, 2 * question["seconds"] + 1)
        reply = answer(question)
        if os.getpid() != worker:  # a fork that returned: its reply would be taken for that to the next question
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


def _end_with_owner() -> None:
    """Kills this process, with all that it has started in its process group, as soon as the pool's process is gone."""
    if (descriptor := os.environ.pop(OWNER_PIPE, None)) is None:
        return
    os.set_inheritable(int(descriptor), False)

    def wait_for_end() -> None:
        os.read(int(descriptor), 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_end, name="owner", daemon=True).start()
