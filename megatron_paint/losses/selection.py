"""The sparse set M: the positions of each rollout that get the interpolated target. Axes: T response tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_paint.config.loss import InterpolationLossConfig


def select_positions(
    student_entropy_T: torch.Tensor,
    teacher_entropy_T: torch.Tensor,
    *,
    lengths: Sequence[int],
    config: InterpolationLossConfig,
    rollout_keys: Sequence[int] | None = None,
) -> torch.Tensor:
    """Selects positions rollout by rollout, so that the result depends on neither packing nor layout.

    Entropies [T] in nats, rollouts one after the other, sum(lengths) == T. Returns [T] bool: the
    ceil(fraction * N - 1e-9) largest mismatches of each rollout of N tokens, ties to the earlier position
    (top_fraction), or every mismatch strictly above threshold_nats (threshold), or the result of select_blindly.
    """
    blind_T = select_blindly(lengths=lengths, config=config, rollout_keys=rollout_keys, device=student_entropy_T.device)
    if blind_T is not None:
        return blind_T
    mismatch_T = _mismatch(student_entropy_T, teacher_entropy_T, config)
    if config.positions == "threshold":
        return mismatch_T > config.threshold_nats
    return _top_fraction(mismatch_T, lengths, config.fraction)


def select_blindly(
    *,
    lengths: Sequence[int],
    config: InterpolationLossConfig,
    rollout_keys: Sequence[int] | None,
    device: torch.device,
) -> torch.Tensor | None:
    """The selection if it needs no entropies (all, none, random, a top fraction of 0 or 1), otherwise None.

    random: ceil(fraction * N - 1e-9) positions of each rollout, drawn only from its key, an int in [0, 2**128).
    """
    tokens = sum(lengths)
    if config.positions in ("all", "none"):
        return torch.full((tokens,), config.positions == "all", dtype=torch.bool, device=device)
    if config.positions == "top_fraction" and config.fraction in (0.0, 1.0):
        return torch.full((tokens,), config.fraction == 1.0, dtype=torch.bool, device=device)
    if config.positions != "random":
        return None
    if rollout_keys is None or len(rollout_keys) != len(lengths):
        got = "none" if rollout_keys is None else f"{len(rollout_keys)} keys"
        raise ValueError(
            f"rollout_keys: got {got} for {len(lengths)} rollouts; positions random draws each rollout from its own "
            "key; pass one int per rollout"
        )
    drawn = [
        _draw(length, selected_count(length, config.fraction), key)
        for length, key in zip(lengths, rollout_keys, strict=True)
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=bool), *drawn])).to(device)


def selected_count(length: int, fraction: float) -> int:
    """The number of positions of a rollout that top_fraction selects; because of 1e-9, 0.1 * 30 is 3."""
    return max(0, math.ceil(fraction * length - 1e-9))


def _mismatch(
    student_entropy_T: torch.Tensor, teacher_entropy_T: torch.Tensor, config: InterpolationLossConfig
) -> torch.Tensor:
    difference_T = teacher_entropy_T - student_entropy_T
    if config.mismatch == "absolute":
        return difference_T.abs()
    return difference_T if config.mismatch == "teacher_minus_student" else -difference_T


def _top_fraction(mismatch_T: torch.Tensor, lengths: Sequence[int], fraction: float) -> torch.Tensor:
    device = mismatch_T.device
    lengths_R = torch.tensor(lengths, dtype=torch.long, device=device)
    counts_R = torch.tensor([selected_count(n, fraction) for n in lengths], dtype=torch.long, device=device)
    rollout_T = torch.repeat_interleave(lengths_R, output_size=mismatch_T.numel())
    # Two stable sorts, by mismatch and then by rollout, keep the order of ties and need no loop over rollouts.
    order_T = torch.argsort(mismatch_T, descending=True, stable=True)
    order_T = order_T[torch.argsort(rollout_T[order_T], stable=True)]
    starts_R = torch.cumsum(lengths_R, 0) - lengths_R
    rank_T = torch.arange(mismatch_T.numel(), device=device) - starts_R[rollout_T]
    selected_T = torch.zeros_like(mismatch_T, dtype=torch.bool)
    selected_T[order_T] = rank_T < counts_R[rollout_T]
    return selected_T


def _draw(length: int, count: int, key: int) -> np.ndarray:
    if isinstance(key, bool) or not isinstance(key, (int, np.integer)) or not 0 <= key < 2**128:
        raise ValueError(
            f"rollout_keys: got {key!r}; a key is an int in [0, 2**128); hash the rollout's identity to one"
        )
    # Raw Philox words and a stable sort: unlike numpy's Generator methods, these never change between releases.
    words = np.random.Philox(key=int(key)).random_raw(length)
    selected = np.zeros(length, dtype=bool)
    selected[np.argsort(words, kind="stable")[:count]] = True
    return selected
