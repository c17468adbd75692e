r"""The program of a grading worker. It reads questions on stdin and writes verdicts on stdout, one JSON object a line.

It is a separate process because math-verify can hang inside C code on a hostile answer. No exception reaches it there,
so the parent kills the process. Importing this file loads neither torch nor megatron.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from megatron_paint.grading.compare import Options, answers_equal, parse_values, prose_equal

MEMORY_BYTES = 4 << 30  # a power tower allocates all memory before it takes much time


def first_equal(question: dict[str, Any]) -> int | None:
    """Returns the index of the first candidate that equals the gold answer; None if no candidate does."""
    options = Options(
        kinds=tuple(question["kinds"]),
        precision=question["precision"],
        strict=question["strict"],
        set_relation=question["set_relation"],
    )
    equal = prose_equal if question["prose"] else answers_equal
    for index, candidate in enumerate(question["candidates"]):
        if equal(question["gold"], candidate, options):
            return index
    return None


def judge(question: dict[str, Any]) -> dict[str, Any]:
    """Returns the verdict on one question: {"agrees": index or null}, or {"failed": the error of an exceeded limit}."""
    try:
        return {"agrees": first_equal(question)}
    except (MemoryError, RecursionError) as error:
        return {"failed": type(error).__name__}
    except Exception:  # on text that is no mathematics the parser raises any error; then no candidate is equal
        return {"agrees": None}


def main() -> None:
    """Answers questions until stdin ends."""
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    try:
        # The first parse builds the grammar. This must not count against the time of the first question.
        parse_values("\\frac{1}{2}", ("latex", "expr"))
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}) + "\n")
        return
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, 1)
    os.dup2(null_device, 2)  # the parser prints a warning for every odd character
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin.buffer:
        question = json.loads(line)
        # The alarm's default action ends the process even inside C code, so no worker runs on without its parent.
        signal.setitimer(signal.ITIMER_REAL, 2 * question["seconds"] + 1)
        reply = judge(question)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
