"""What the number of a step decides: its learning rate and the tasks after it. A resumed run restores none of this."""

import math
from collections.abc import Sequence
from typing import Literal

from megatron_paint.config.settings import OptimizerSettings, RunSettings

Task = Literal["checkpoint", "export", "evaluation"]


def learning_rate(step: int, *, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step 1 .. `steps`: a linear rise over the warm-up, then constant, linear or cosine decay.

    The rise reaches `lr` at step `warmup_steps`. The decay reaches `min_lr` at step `decay_steps`, or at the last step
    if that is not set, and the rate stays there.
    """
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.decay == "constant":
        return settings.lr
    end = steps if settings.decay_steps is None else settings.decay_steps
    progress = min(1.0, (step - settings.warmup_steps) / (end - settings.warmup_steps))
    height = 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_lr + (settings.lr - settings.min_lr) * height


def expired_checkpoints(steps: Sequence[int], run: RunSettings) -> list[int]:
    """The steps of the complete checkpoints that are to be removed; the newest checkpoint is always kept."""
    if run.keep_last is None:
        return []
    return [step for step in sorted(steps)[: -run.keep_last] if run.keep_every is None or step % run.keep_every]


def due_after(step: int, run: RunSettings) -> list[Task]:
    """The tasks after a step, in this order. Step 0 is the start, after which the model is evaluated.

    All tasks follow the last step. A task follows another step if that is a multiple of the task's period. The
    checkpoint comes first: a run that ends during the other tasks does them when it resumes.
    """
    if step == 0:
        return ["evaluation"]
    periods: dict[Task, int] = {
        "checkpoint": run.save_every,
        "export": run.export_every,
        "evaluation": run.evaluate_every,
    }
    return [task for task, period in periods.items() if step == run.steps or (period and step % period == 0)]
