"""The frequencies of rotary positions, plain and with YaRN, and the scale of attention scores that belongs to them.

Megatron's YarnRotaryEmbedding has no `attention_factor`, and its forward pass has no positions of packed rows. Megatron
also computes frequencies on the GPU, where a power may differ in the last bit. At position 131,000 one bit is an angle
of up to 0.008. So ours are computed on the CPU, with the operations of `transformers` in their order, to the bit.
"""

import math

import torch
from torch import Tensor

from megatron_paint.models.shape import ModelShape, Yarn


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Angles per position [head size / 2] in float32, on the CPU."""
    size = shape.head_dim
    wave_D = shape.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if shape.yarn is None:
        return 1.0 / wave_D
    kept_D = 1 - _ramp(shape.yarn, size, shape.rope_theta)
    return 1.0 / (shape.yarn.factor * wave_D) * (1 - kept_D) + 1.0 / wave_D * kept_D


def _ramp(yarn: Yarn, size: int, theta: float) -> Tensor:
    """How far each frequency is divided by the factor: 0 not at all, 1 completely."""

    def index_with(turns: float) -> float:
        """The index of the frequency that turns so often over the original length."""
        return size * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_with(yarn.beta_fast), index_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def attention_scale(shape: ModelShape) -> float | None:
    """The factor of attention scores before the softmax; None: the usual 1 / sqrt(head size).

    YaRN multiplies cosine and sine by a factor, and so queries and keys. The scores get its square.
    """
    return None if shape.yarn is None else shape.yarn.attention_factor**2 / math.sqrt(shape.head_dim)
