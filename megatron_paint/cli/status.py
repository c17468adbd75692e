"""`megatron-paint status`: the state of a run, also while it runs."""

import argparse
from dataclasses import asdict

from megatron_paint.base.json_text import to_json
from megatron_paint.run.status import read_status, status_lines


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Prints the status; returns the exit status."""
    status = read_status(options.run_dir)
    print(to_json(asdict(status)) if options.json else "\n".join(status_lines(status)))
    return 0
