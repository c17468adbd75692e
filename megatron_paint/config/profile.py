"""Settings of the profile of chosen steps: `run.profile`."""

from collections.abc import Iterator
from typing import Annotated

from megatron_paint.config.dialect import Count, Flag, Text, Whole, setting, settings_class

SECTION = "run.profile"
PHASES = ("rollout", "grade", "mask", "teacher", "student", "optimizer", "checkpoint", "export", "evaluation")


@settings_class
class ProfileSettings:
    """A profile of chosen steps: a trace of torch's profiler, and a time line of the phases on all ranks."""

    steps: Annotated[
        tuple[Count, ...],
        setting("steps that are profiled, each with the checkpoint, export and evaluation that follow it"),
    ]
    ranks: Annotated[
        tuple[Whole, ...], setting("ranks that write a trace, from 0; the time line always has all ranks")
    ] = (0,)
    phases: Annotated[
        tuple[Text, ...] | None,
        setting(
            f"phases in which traces have the operators, of {', '.join(PHASES)}; null: the complete step. Sampling has "
            "millions of operators with a large model and long responses: leave out rollout and evaluation then"
        ),
    ] = None
    stacks: Annotated[Flag, setting("traces have every Python call too; they are several times as large")] = False
    memory: Annotated[Flag, setting("traces have every allocation of a tensor too")] = False


def contradictions_of(profile: ProfileSettings | None, *, steps: int) -> Iterator[str]:
    """Yields what is wrong with the section. steps: run.steps."""
    if profile is None:
        return
    for name, values, example in (
        ("steps", profile.steps, 3),
        ("ranks", profile.ranks, 0),
        ("phases", profile.phases, "student"),
    ):
        if values is None:
            continue
        if not values:
            yield f"{SECTION}.{name} is empty: name at least one, such as {name}: [{example}]"
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            yield f"{SECTION}.{name} names {repeated[0]} more than once: name each once"
    if beyond := [step for step in profile.steps if step > steps]:
        yield f"{SECTION}.steps has step {min(beyond)}, but run.steps={steps}: choose steps from 1 to {steps}"
    if negative := [rank for rank in profile.ranks if rank < 0]:
        yield f"{SECTION}.ranks has {min(negative)}: ranks are counted from 0"
    if unknown := [phase for phase in profile.phases or () if phase not in PHASES]:
        yield f"{SECTION}.phases has {unknown[0]}, which is no phase: the phases are {', '.join(PHASES)}"
