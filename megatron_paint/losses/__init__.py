"""The vocabulary-parallel sparse interpolation loss, its reference, and token log-probabilities. Needs only torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_paint.base.lazy import lazy_attributes
from megatron_paint.config.loss import InterpolationLossConfig

if TYPE_CHECKING:
    from megatron_paint.losses.fused import fused_interpolation_loss
    from megatron_paint.losses.logprobs import TokenLogprobs, token_logprobs
    from megatron_paint.losses.output import InterpolationOutput, LossOutput
    from megatron_paint.losses.reference import interpolation_loss
    from megatron_paint.losses.vocab import ShardedVocab, VocabAxis, WholeVocab

__all__ = [
    "InterpolationLossConfig",
    "InterpolationOutput",
    "LossOutput",
    "ShardedVocab",
    "TokenLogprobs",
    "VocabAxis",
    "WholeVocab",
    "fused_interpolation_loss",
    "interpolation_loss",
    "token_logprobs",
]

# Settings are checked where torch may be missing or slow to load: everything that needs it is imported on first use.
_HOME = {
    "InterpolationOutput": "output",
    "LossOutput": "output",
    "ShardedVocab": "vocab",
    "TokenLogprobs": "logprobs",
    "VocabAxis": "vocab",
    "WholeVocab": "vocab",
    "fused_interpolation_loss": "fused",
    "interpolation_loss": "reference",
    "token_logprobs": "logprobs",
}

__getattr__ = lazy_attributes(__name__, _HOME)
