"""Spaces and settings that the tests of the search share."""

import json
from pathlib import Path

from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.search.space import Space, read_space

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "examples/search/one_process.yaml"  # its paths are relative to ROOT
SMALL = {
    "budget": {"steps": 4, "evaluate_every": 2},
    "validation": {"problems": "examples/search/validation.jsonl", "limit": 12, "samples": 2},
    "sampler": {"startup_trials": 2},
    "parameters": {
        "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "objective.reveal.minimum": {"low": 0.0, "high": 1.0, "step": 0.1},
        "objective.loss.clip": {"choices": [None, 0.05, 1.0]},
        "objective.loss.clip_rule": {"choices": ["entry", "token"], "when": {"objective.loss.clip": [0.05, 1.0]}},
    },
}


def given(*overrides: str) -> Settings:
    """Settings of trial 0."""
    return load_settings(SETTINGS, overrides)


def write_space(folder: Path, **sections: object) -> Path:
    """The small space with these sections replaced."""
    path = folder / "space.yaml"
    path.write_text(json.dumps(SMALL | sections))  # JSON is YAML, in this order
    return path


def space(folder: Path, *overrides: str, **sections: object) -> Space:
    """The same, read."""
    return read_space(write_space(folder, **sections), given(*overrides))
