"""Warnings before a profiled run: nothing will be profiled, or more than one can use."""

import pytest

from megatron_paint.config.load import settings_of
from megatron_paint.training.profile_warnings import profile_warnings


def warnings(profile, *, start=0, layers=36, **changes):
    tree = {
        "model": {"hf_path": "m"},
        "data": {"train": "p.jsonl"},
        "run": {"dir": "r", "steps": 10, "evaluate_every": 4, "profile": profile},
        "rollout": {"max_new_tokens": 1000},
        **changes,
    }
    return list(profile_warnings(settings_of(tree), start=start, layers=layers))


def test_no_step_is_left():
    """A run that is complete is not resumed."""
    (warning,) = warnings({"steps": [2, 5]}, start=5)
    assert warning == "run.profile.steps=[2, 5]: no step is profiled, because the run resumes after step 5"
    assert warnings({"steps": [2, 5]}, start=10) == []


def test_a_large_trace_of_sampling():
    """36 layers, 1,000 positions and 600 events for each."""
    (warning,) = warnings({"steps": [2, 3]}, start=2)
    assert "22 million events or more of the phase rollout (5.4 GB before compression" in warning
    assert "1,000 tokens: leave the phase out, such as run.profile.phases=[teacher,student,optimizer]" in warning


HELD_OUT = {"problems": "h.jsonl", "max_new_tokens": 2000}


@pytest.mark.parametrize(
    ("profile", "changes", "phases"),
    [
        ({"steps": [3]}, {}, ["rollout"]),
        ({"steps": [3]}, {"layers": 2}, []),
        ({"steps": [3]}, {"rollout": {"max_new_tokens": 100}}, []),
        ({"steps": [3]}, {"rollout": {"engine": "replay", "path": "r"}}, []),
        ({"steps": [3]}, {"objective": {"name": "sft"}}, []),
        ({"steps": [3]}, {"evaluation": HELD_OUT}, ["rollout"]),
        ({"steps": [4]}, {"evaluation": HELD_OUT}, ["rollout", "evaluation"]),
        ({"steps": [10]}, {"evaluation": HELD_OUT, "objective": {"name": "sft"}}, ["evaluation"]),
        ({"steps": [4], "phases": ["student", "evaluation"]}, {"evaluation": HELD_OUT}, ["evaluation"]),
        ({"steps": [4], "phases": ["student"]}, {"evaluation": HELD_OUT}, []),
    ],
)
def test_which_phases_are_large(profile, changes, phases):
    found = warnings(profile, **changes)
    assert len(found) == len(phases)
    assert all(f"of the phase {phase} " in text for phase, text in zip(phases, found, strict=True))
