"""The section `run.profile`: what is refused, and that a resumed run may change it."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.profile import ProfileSettings
from megatron_paint.config.saved import forbidden_changes
from megatron_paint.config.tree import settings_tree
from megatron_paint.planning.layout import check_profiled_ranks


def settings(profile, **run):
    run = {"dir": "r", "steps": 10, "profile": profile, **run}
    return settings_of({"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": run})


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({}, r"run\.profile\.steps"),
        ({"steps": []}, r"run\.profile\.steps is empty: name at least one, such as steps: \[3\]"),
        ({"steps": [3, 11, 12]}, r"run\.profile\.steps has step 11, but run\.steps=10: choose steps from 1 to 10"),
        ({"steps": [0]}, r"run\.profile\.steps.* nearest valid value is 1"),
        ({"steps": [3, 4, 3]}, r"run\.profile\.steps names 3 more than once"),
        ({"steps": 3}, r"run\.profile\.steps .*: got 3; it must be a list, such as \[3\]$"),
        ({"steps": [3], "ranks": []}, r"run\.profile\.ranks is empty: name at least one, such as ranks: \[0\]"),
        ({"steps": [3], "ranks": [-1]}, r"run\.profile\.ranks has -1: ranks are counted from 0"),
        ({"steps": [3], "ranks": [1, 1]}, r"run\.profile\.ranks names 1 more than once"),
        (
            {"steps": [3], "phases": []},
            r"run\.profile\.phases is empty: name at least one, such as phases: \[student\]",
        ),
        ({"steps": [3], "phases": ["loss"]}, r"run\.profile\.phases has loss, which is no phase: .* rollout, grade"),
        ({"steps": [3], "stack": True}, r"unknown setting run\.profile\.stack: did you mean run\.profile\.stacks\?"),
    ],
)
def test_what_is_refused(profile, says):
    with pytest.raises(UserError, match=says) as error:
        settings(profile)
    assert "\n" not in str(error.value)


def test_what_is_read():
    assert settings(None).run.profile is None
    assert settings({"steps": [4, 2]}).run.profile == ProfileSettings(steps=(4, 2), ranks=(0,))
    assert settings_of(settings_tree(settings({"steps": [4], "phases": ["student"]}))).run.profile.phases == (
        "student",
    )


@pytest.mark.parametrize(("ranks", "processes"), [((0,), 1), ((0, 3), 4)])
def test_ranks_that_the_run_has(ranks, processes):
    check_profiled_ranks(ProfileSettings(steps=(1,), ranks=ranks), processes=processes)
    check_profiled_ranks(None, processes=processes)


@pytest.mark.parametrize(
    ("ranks", "processes", "says"),
    [
        ((0, 1), 1, r"ranks has rank 1, but the run has 1 rank: choose rank 0$"),
        ((5, 4), 4, r"ranks has rank 4, but the run has 4 ranks: choose from 0 to 3$"),
    ],
)
def test_ranks_that_it_does_not_have(ranks, processes, says):
    with pytest.raises(UserError, match=says):
        check_profiled_ranks(ProfileSettings(steps=(1,), ranks=ranks), processes=processes)


def test_a_resumed_run_may_change_it():
    """Neither a number nor a file of the run depends on it."""
    without, some = settings_tree(settings(None)), settings_tree(settings({"steps": [3]}))
    other = settings_tree(settings({"steps": [4], "ranks": [1], "phases": ["mask"], "stacks": True, "memory": True}))
    earlier = settings_tree(settings(None))
    del earlier["run"]["profile"]  # of a version without the section
    for old, new in ((without, some), (some, without), (some, other), (earlier, some), (earlier, without)):
        assert forbidden_changes(old=old, new=new) == []
