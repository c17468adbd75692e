"""What a run left and printed, in the form in which two runs can be compared."""

import json
from collections.abc import Collection
from pathlib import Path

from tests.support.exports import weights
from tests.support.forked_ranks import Ended

# Metrics that only a step has whose rollouts were sampled, and not read from a file.
SAMPLER = ("sampler_gap/max", "sampler_gap/mean", "sampler_gap/above_share")


def metrics(run: Path, *, without: Collection[str] = ()) -> list[dict]:
    """The lines of metrics.jsonl, without times and memory, and without the keys that are named."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = {"tokens_per_second", *without}
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/")) and k not in left_out}
        for line in lines
    ]


def events(ended: Ended, *kinds: str) -> list[tuple[str, int]]:
    """(event, step) in the order in which rank 0 printed them."""
    printed = [json.loads(line) for line in ended.out[0].splitlines()]
    return [(event["event"], event["step"]) for event in printed if event["event"] in kinds]


def last_event(ended: Ended) -> dict:
    """The last event that rank 0 printed, without the run's folder."""
    event = json.loads(ended.out[0].splitlines()[-1])
    return {key: value for key, value in event.items() if key != "folder"}


def check_complete(run: Path) -> None:
    """Whatever has its final name is complete."""
    for checkpoint in (run / "checkpoints").glob("step_*"):
        assert (checkpoint / "complete").exists(), checkpoint
        assert json.loads((checkpoint / "run_state.json").read_text())["step"] == int(checkpoint.name[-6:])
    for export in (run / "hf").glob("step_*"):
        assert weights(export)
        assert json.loads((export / "config.json").read_text())["dtype"] == "float32"
    for file in (run / "samples").glob("step_*"):
        assert len([json.loads(line) for line in file.read_text().splitlines()]) == 4
    if (run / "metrics.jsonl").exists():
        assert all(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
