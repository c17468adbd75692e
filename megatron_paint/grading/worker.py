r"""The program of a grading worker, which asks math-verify.

It is a separate process because math-verify can hang inside C code on a hostile answer. No exception reaches it there,
so the parent kills the process. Importing this file loads neither torch nor megatron.
"""

from typing import Any

from megatron_paint.grading.compare import Options, answers_equal, parse_values, prose_equal
from megatron_paint.grading.protocol import Answer, serve

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


def prepare() -> Answer:
    """Loads math-verify. Raises ImportError, with the cure, if it is not installed."""
    try:
        # The first parse builds the grammar. This must not count against the time of the first question.
        parse_values("\\frac{1}{2}", ("latex", "expr"))
    except ImportError as error:
        advice = "Install math-verify with its parser: pip install 'math-verify[antlr4_13_2]'"
        raise ImportError(f"{error}. {advice}") from error
    return judge


if __name__ == "__main__":
    serve(prepare, memory_bytes=MEMORY_BYTES)
