r"""The program that a grading worker runs: questions in on stdin, verdicts out on stdout, one JSON object a line.

A process of its own, because math-verify can hang inside C code on a hostile answer, where no exception reaches it:
its parent kills it then. Importing this file loads neither torch nor megatron.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 4 << 30  # a power tower asks for all memory before it asks for much time
DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
PLAIN_NUMBER = re.compile(r"-?[\d., ]+%?")


def readings(text: str, kinds: list[str]) -> list[Any]:
    """The values that math-verify reads in one side; empty if it reads none.

    Text without math delimiters is an expression itself and is boxed for the parser, which finds no LaTeX outside
    delimiters. A number is read as plain text, too: LaTeX takes the European `1000,99` for a list.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = {"latex": LatexExtractionConfig(boxed_match_priority=0), "expr": ExprExtractionConfig()}
    chosen = [configs[kind] for kind in kinds]
    # No time limit of math-verify's own: its alarm would not interrupt C code; the parent's limit does.
    if DELIMITER.search(text) or "latex" not in kinds:
        return parse(text, chosen, parsing_timeout=None)
    values = parse("\\boxed{" + text + "}", chosen, parsing_timeout=None)
    if "expr" in kinds and PLAIN_NUMBER.fullmatch(text):
        values = values + parse(text, [configs["expr"]], parsing_timeout=None)
    return values


def agrees(question: dict[str, Any]) -> int | None:
    """Index of the first candidate that equals the gold answer; None if none does."""
    from math_verify import verify

    gold = readings(question["gold"], question["kinds"])
    for index, candidate in enumerate(question["candidates"]):
        if verify(
            gold,
            readings(candidate, question["kinds"]),
            float_rounding=question["precision"],
            strict=question["strict"],
            allow_set_relation_comp=question["set_relation"],
            timeout_seconds=None,
        ):
            return index
    return None


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one question: {"agrees": index or null}, or {"failed": what ran out}."""
    try:
        return {"agrees": agrees(question)}
    except (MemoryError, RecursionError) as error:
        return {"failed": type(error).__name__}
    except Exception:  # the parser raises anything on text that is no mathematics: no agreement
        return {"agrees": None}


def main() -> None:
    """Serve until stdin ends."""
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    try:
        # The first parse builds the grammar; it must not count against the first question's time.
        readings("\\frac{1}{2}", ["latex", "expr"])
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}) + "\n")
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)  # the parser complains about every odd character
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin.buffer:
        question = json.loads(line)
        # The default action ends the process even inside C code: nothing goes on when the parent is gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * question["seconds"] + 1)
        reply = answer(question)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
