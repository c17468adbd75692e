"""PAINT on Megatron-Core: partial-solution adaptive interpolated training for self-distilled reasoners.

The names in `__all__` are the public interface. A name is imported when it is first used, so that importing the package
does not import torch.
"""

from typing import TYPE_CHECKING

from megatron_paint.base.lazy import lazy_attributes

if TYPE_CHECKING:
    from megatron_paint.config.load import load_settings
    from megatron_paint.config.loss import InterpolationLossConfig
    from megatron_paint.config.settings import Settings
    from megatron_paint.convert.folders import convert_to_hf, convert_to_megatron
    from megatron_paint.grading.grade import grade
    from megatron_paint.losses import ShardedVocab, WholeVocab, fused_interpolation_loss, interpolation_loss
    from megatron_paint.masker.cut import cut_solution
    from megatron_paint.masker.overlap import measure_overlap
    from megatron_paint.objectives import Grpo, Paint, Sft
    from megatron_paint.policy import Policy
    from megatron_paint.training.start import train

__version__ = "0.1.0"

__all__ = [
    "Grpo",
    "InterpolationLossConfig",
    "Paint",
    "Policy",
    "Settings",
    "Sft",
    "ShardedVocab",
    "WholeVocab",
    "__version__",
    "convert_to_hf",
    "convert_to_megatron",
    "cut_solution",
    "fused_interpolation_loss",
    "grade",
    "interpolation_loss",
    "load_settings",
    "measure_overlap",
    "train",
]

_HOME = {
    "Grpo": "objectives",
    "InterpolationLossConfig": "config.loss",
    "Paint": "objectives",
    "Policy": "policy",
    "Settings": "config.settings",
    "Sft": "objectives",
    "ShardedVocab": "losses",
    "WholeVocab": "losses",
    "convert_to_hf": "convert.folders",
    "convert_to_megatron": "convert.folders",
    "cut_solution": "masker.cut",
    "fused_interpolation_loss": "losses",
    "grade": "grading.grade",
    "interpolation_loss": "losses",
    "load_settings": "config.load",
    "measure_overlap": "masker.overlap",
    "train": "training.start",
}

__getattr__ = lazy_attributes(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
