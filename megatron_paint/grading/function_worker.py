"""The program of a worker that calls a grader's function: a user's own, or the search for a pattern.

Arguments: `module:function` and the folder from which modules are imported first. Only here is a user's module
imported, never in a rank. Importing this file loads neither torch nor megatron.
"""

import importlib
import inspect
import numbers
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from megatron_paint.grading.protocol import Answer, serve

SEARCH = "megatron_paint.grading.function_worker:last_match"
LONGEST_REASON = 300  # characters
CALL = "function(response: str, answer: str, problem: dict)"
NUMPY_BOOLEANS = ("numpy.bool", "numpy.bool_")  # of numpy 2 and 1
RETURNS = "True, False or a number from 0 to 1"


def last_match(response: str, answer: str, problem: dict[str, Any]) -> str | None:
    """Returns the group of the last match of a pattern in a response; None without a match. answer: the pattern."""
    found: re.Match[str] | None = None
    for match in re.finditer(answer, response):
        found = match
    return None if found is None else found[1] or ""


def prepare(name: str, folder: str) -> Answer:
    """Imports the function. Raises ImportError if it cannot be imported or cannot be called with three arguments."""
    os.chdir(folder)
    if sys.flags.safe_path:  # PYTHONSAFEPATH: `python -m` has added no entry
        sys.path.insert(0, folder)
    else:
        sys.path[0] = folder  # in place of the entry of `python -m`; PYTHONPATH follows
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except BaseException as error:  # a user's module may raise anything, SystemExit too
        raise ImportError(f"it cannot be imported from {folder} or PYTHONPATH: {reason_of(error)}") from error
    if not callable(function):
        raise ImportError(f"it is {type(function).__name__}, no function; it is called as {CALL}")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        raise ImportError(f"its arguments do not fit ({error}); it is called as {CALL}") from error
    except ValueError:
        pass  # a function in C without a signature; the first call shows whether it fits
    return find if name == SEARCH else lambda question: judge(function, question)


def find(question: dict[str, Any]) -> dict[str, Any]:
    """Returns {"match": the text or null} of a search."""
    return {"match": last_match(question["response"], question["answer"], {})}


def judge(function: Callable[..., Any], question: dict[str, Any]) -> dict[str, Any]:
    """Calls a user's function. Returns {"score": 0 to 1}, or {"error": reason}."""
    try:
        value = function(question["response"], question["answer"], question["problem"])
    except MemoryError as error:
        return {"error": reason_of(error), "leave": True}  # what it has allocated may remain
    except BaseException as error:  # SystemExit too: the verdict is missing, and the worker continues
        return {"error": reason_of(error)}
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if kind in NUMPY_BOOLEANS:  # the only scalar of numpy that is no number for Python
        value = bool(value)
    if not isinstance(value, numbers.Real):
        return {"error": f"it returned {kind}; it must return {RETURNS}"}
    if not 0 <= value <= 1:  # NaN and infinity too
        return {"error": f"it returned {_number_text(value)}; it must return {RETURNS}"}
    return {"score": float(value)}


def _number_text(value: numbers.Real) -> str:
    """A number in few characters. Python makes no text of integers of more than some thousand digits."""
    try:
        return f"{float(value):g}"
    except OverflowError:
        return (
            f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "a number too large for a float"
        )


def reason_of(error: BaseException) -> str:
    """Returns one line: the error, and the file and line of the user's that raised it."""
    ours = (__file__, importlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error whose text cannot be made
        text = ""
    return f"{type(error).__name__}: {text}"[:LONGEST_REASON].removesuffix(": ") + place


if __name__ == "__main__":
    serve(lambda: prepare(sys.argv[1], sys.argv[2]), memory_bytes=None)
