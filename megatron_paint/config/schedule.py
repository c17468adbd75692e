"""What a step's number decides: its learning rate and what is due after it; a resumed run has nothing to restore."""

import math
from collections.abc import Sequence
from typing import Literal

from megatron_paint.config.settings import OptimizerSettings, RunSettings

Task = Literal["checkpoint", "export", "evaluation"]


def learning_rate(step: int, *, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step 1 .. `steps`: a linear rise over the warm-up, then constant, linear or cosine decay.

    The rise reaches `lr` at step `warmup_steps`; the decay reaches `min_lr` at step `decay_steps`, or at the last one,
    and stays there.
    """
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.decay == "constant":
        return settings.lr
    end = steps if settings.decay_steps is None else settings.decay_steps
    progress = min(1.0, (step - settings.warmup_steps) / (end - settings.warmup_steps))
    height = 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_lr + (settings.lr - settings.min_lr) * height


def outlived(steps: Sequence[int], run: RunSettings) -> list[int]:
    """Which of the complete checkpoints at these steps are kept no longer; the newest always is."""
    if run.keep_last is None:
        return []
    return [step for step in sorted(steps)[: -run.keep_last] if run.keep_every is None or step % run.keep_every]


def due_after(step: int, run: RunSettings) -> list[Task]:
    """What follows a step, in this order; step 0 is the start, after which the model is evaluated.

    The last step is followed by everything, another one by what it is a multiple of the period of. The checkpoint comes
    first: a run that ends during the rest does the rest when it is resumed.
    """
    if step == 0:
        return ["evaluation"]
    periods: dict[Task, int] = {
        "checkpoint": run.save_every,
        "export": run.export_every,
        "evaluation": run.evaluate_every,
    }
    return [task for task, period in periods.items() if step == run.steps or (period and step % period == 0)]
