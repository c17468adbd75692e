"""What a run left whose rollouts came from servers, and whether it is complete."""

import json
from pathlib import Path

from tests.support.results import metrics

STEPS, SAMPLES = 3, 4  # of the short runs; samples in each step


def samples_of(run: Path, *, steps: int = STEPS) -> list[dict]:
    """All samples of a finished run, which must be complete."""
    files = sorted((run / "samples").glob("step_*.jsonl"))
    assert len(files) == steps
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(step) for step in lines] == [SAMPLES] * steps
    return [line for step in lines for line in step]


def check(run: Path, *, steps: int = STEPS, ahead: int = 0, in_step: tuple[int, ...] = (1,)) -> None:
    """Every token was sampled with the weights that its step started from, and no weight is the trainer's alone.

    ahead: 1 for weights one step older. in_step: the steps whose rollouts are of the current weights nevertheless.
    """
    for sample in samples_of(run, steps=steps):
        (span,) = sample["origin"]["weights"]
        assert (span["start"], span["end"]) == (0, len(sample["response_ids"]))
        behind = ahead * (sample["step"] not in in_step)
        assert sample["origin"]["behind"] == behind
        assert int(span["version"].partition("/")[2]) == sample["step"] - 1 - behind
        assert sample["origin"]["finish_reason"] == ("stop" if sample["finished"] else "length")
    for step in metrics(run):
        if ahead and step["step"] not in in_step:
            assert step["sampler_gap/max"] is None
        else:
            assert 0 < step["sampler_gap/max"] < 1e-4  # the sampled tokens' log-probabilities are the trainer's
        if ahead and step["step"] == steps:
            assert "rollout/spot_check_gap" not in step  # nothing was sampled with its weights
        else:
            assert step["rollout/spot_check_gap"] < 1e-4


def servers_in(run: Path, *, steps: int = STEPS) -> set[str]:
    """The addresses of the servers that sampled."""
    return {sample["origin"]["server"] for sample in samples_of(run, steps=steps)}
