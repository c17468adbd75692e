"""The learning rate of a step: a function of the step alone, so that a resumed run has nothing to restore."""

import math

from megatron_paint.config import OptimizerSettings


def learning_rate(step: int, *, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step 1 .. `steps`: a linear rise over the warm-up, then constant, linear or cosine decay.

    The rise reaches `lr` at step `warmup_steps`; the decay reaches `min_lr` at the last step.
    """
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.decay == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / (steps - settings.warmup_steps)
    height = 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_lr + (settings.lr - settings.min_lr) * height
