"""What the user of `run.profile` should know before the run starts."""

from collections.abc import Iterator

from megatron_paint.config.schedule import due_after
from megatron_paint.config.settings import Settings

EVENTS = 600  # of a trace, for each layer and decoded position; measured on the CPU with two tensor-parallel ranks
MOST_EVENTS = 5_000_000  # about 1.2 GB before compression; ours
EVENT_BYTES = 250  # before compression; measured


def profile_warnings(settings: Settings, *, start: int, layers: int) -> Iterator[str]:
    """Yields a warning if no step will be profiled, and one if a trace will be large.

    start: the last step done. layers: of one pipeline stage. `run.profile` must be set.
    """
    profile = settings.run.profile
    steps = [step for step in profile.steps if step > start]
    if not steps and start < settings.run.steps:
        yield (
            f"run.profile.steps={list(profile.steps)}: no step is profiled, because the run resumes after step {start}"
        )
    phases = profile.phases or ("rollout", "evaluation")
    positions = {}
    if steps and "rollout" in phases and settings.needs.samples_per_problem and settings.rollout.engine == "megatron":
        positions["rollout"] = settings.rollout.max_new_tokens
    evaluated = any("evaluation" in due_after(step, settings.run) for step in steps)
    if "evaluation" in phases and evaluated and settings.evaluation.problems is not None:
        positions["evaluation"] = settings.evaluation.longest_answer
    for phase, count in positions.items():
        if (events := EVENTS * layers * count) > MOST_EVENTS:
            yield (
                f"run.profile: a trace will have {events / 1e6:,.0f} million events or more of the phase {phase} "
                f"({EVENT_BYTES * events / 1e9:,.1f} GB before compression, and more in memory), if an answer has "
                f"{count:,} tokens: leave the phase out, such as run.profile.phases=[teacher,student,optimizer]"
            )
