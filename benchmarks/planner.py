"""CPU seconds of the planner: `python benchmarks/planner.py`. The target is 5 s for 235B on 1,024 GPUs, on one core."""

import subprocess
import sys
import time

from megatron_paint.base.errors import UserError
from megatron_paint.planning.search.advice import nothing_fits
from megatron_paint.planning.search.question import Asked, question_of
from megatron_paint.planning.search.search import search

ASKED = (("qwen3_8b", 8), ("qwen3_8b", 1024), ("qwen3_32b", 1024), ("qwen3_30b_a3b", 256), ("qwen3_235b_a22b", 1024))


def measure(model: str, gpus: int) -> str:
    """One line: CPU seconds of a search, and how many layouts it looked at."""
    begin = time.process_time()
    question = question_of(Asked(model=model, gpus=gpus, gpu="h100-80", problems_per_step=gpus))
    found = search(question, top=10)
    seconds = time.process_time() - begin
    best = found.ranked[0].candidate.layout_text() if found.ranked else _text(nothing_fits(question, found))
    refused = sum(found.refused.values())
    return f"{model:16} {gpus:5} GPUs: {seconds:5.2f} s, {found.layouts} layouts, {refused} refused; {best}"


def _text(error: UserError) -> str:
    return str(error)[:160]


def main() -> None:
    """Prints a line for each search, and one for the complete command."""
    for model, gpus in ASKED:
        print(measure(model, gpus), flush=True)
    command = [sys.executable, "-m", "megatron_paint", "plan", "qwen3_32b", "--gpus", "1024", "--gpu", "h100-80"]
    begin = time.perf_counter()
    subprocess.run([*command, "--lora", "64", "--json"], check=True, capture_output=True)
    print(f"the complete command for qwen3_32b on 1,024 GPUs: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
