r"""The program of a grading worker. It reads questions on stdin and writes verdicts on stdout, one JSON object a line.

It is a separate process because math-verify can hang inside C code on a hostile answer. No exception reaches it there,
so the parent kills the process. Importing this file loads neither torch nor megatron.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 4 << 30  # a power tower allocates all memory before it takes much time
DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
PLAIN_NUMBER = re.compile(r"-?[\d., ]+%?")


def parse_values(text: str, kinds: list[str]) -> list[Any]:
    """Returns the values that math-verify finds in an answer; an empty list if it finds none.

    A text without math delimiters is parsed as one expression. It is put into a box, because the parser finds no LaTeX
    outside delimiters. A number is parsed as plain text too, because LaTeX reads the European `1000,99` as a list.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = {"latex": LatexExtractionConfig(boxed_match_priority=0), "expr": ExprExtractionConfig()}
    chosen = [configs[kind] for kind in kinds]
    # math-verify's time limit is off: its alarm does not interrupt C code. The parent's limit does.
    if DELIMITER.search(text) or "latex" not in kinds:
        return parse(text, chosen, parsing_timeout=None)
    values = parse("\\boxed{" + text + "}", chosen, parsing_timeout=None)
    if "expr" in kinds and PLAIN_NUMBER.fullmatch(text):
        values = values + parse(text, [configs["expr"]], parsing_timeout=None)
    return values


def first_equal(question: dict[str, Any]) -> int | None:
    """Returns the index of the first candidate that equals the gold answer; None if no candidate does."""
    from math_verify import verify

    gold = parse_values(question["gold"], question["kinds"])
    for index, candidate in enumerate(question["candidates"]):
        if verify(
            gold,
            parse_values(candidate, question["kinds"]),
            float_rounding=question["precision"],
            strict=question["strict"],
            allow_set_relation_comp=question["set_relation"],
            timeout_seconds=None,
        ):
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
        parse_values("\\frac{1}{2}", ["latex", "expr"])
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
