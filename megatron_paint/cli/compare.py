"""`megatron-paint compare`: two evaluations, paired by problem."""

import argparse
import sys
from dataclasses import asdict

from rich.console import Console

from megatron_paint.base.json_text import to_json
from megatron_paint.evaluation import compare
from megatron_paint.runtime.files import write_atomically

LOG_WIDTH = 120  # of the table where the console is a file


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Prints the comparison; returns the exit status."""
    rows = compare.compare_files(options.a, options.b)
    if odd := compare.sampled_otherwise(options.a, options.b):
        print(f"megatron-paint: warning: the two were sampled otherwise: {'; '.join(odd)}", file=sys.stderr)
    if options.out is not None:
        write_atomically(options.out, compare.markdown(rows, a=options.a, b=options.b))
    if options.json:
        names = {"A": str(options.a), "B": str(options.b)}
        print(to_json([names | asdict(row) for row in rows], indent=1))
        return 0
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    for line in compare.who(options.a, options.b):
        console.print(line, soft_wrap=True, markup=False)
    console.print(compare.console_table(rows))
    return 0
