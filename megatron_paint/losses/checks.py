"""Checks of arguments that the losses share. Axes: T tokens, V this rank's vocabulary columns, H hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_paint.config.loss import InterpolationLossConfig
from megatron_paint.losses.vocab import VocabAxis


def checked_lengths(lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The rollout lengths as ints; ValueError unless they are >= 0 and add up to tokens."""
    checked = tuple(int(length) for length in lengths)
    if any(length < 0 for length in checked) or sum(checked) != tokens:
        raise ValueError(
            f"lengths: got {list(checked)}, {sum(checked)} in all, for {tokens} tokens; each is >= 0 and they add up "
            "to the number of rows; pass the tokens of each rollout in the order of the rows"
        )
    return checked


def check_matrix(name: str, value: torch.Tensor, axes: str, *, like: tuple[int | None, int | None]) -> None:
    """ValueError unless value is a floating point matrix whose sizes are those of like (None: any)."""
    wanted = " x ".join("any" if size is None else str(size) for size in like)
    if value.dim() != 2 or any(size not in (None, got) for size, got in zip(like, value.shape, strict=True)):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; it is {axes}, here {wanted}; pass one row for each of them"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name}: got {value.dtype}; it holds floating point numbers; convert it first")


def check_full_teacher(name: str, value: torch.Tensor | None, config: InterpolationLossConfig) -> None:
    """ValueError unless the full teacher is passed exactly when the partner needs it."""
    if (value is not None) != (config.partner == "full_teacher"):
        got = "nothing" if value is None else "a tensor"
        raise ValueError(
            f"{name}: got {got} with partner {config.partner}; it belongs to partner full_teacher; "
            + ("pass it or set partner to student" if value is None else "drop it or set partner to full_teacher")
        )


def check_initial(name: str, value: torch.Tensor | None, config: InterpolationLossConfig) -> None:
    """ValueError unless the initial weights' part is passed exactly when the support or the partner needs it."""
    if (value is not None) != config.needs_initial:
        got = "nothing" if value is None else "a tensor"
        raise ValueError(
            f"{name}: got {got} with support {config.support} and partner {config.partner}; it belongs to support "
            "initial and partner initial; "
            + ("pass it or set another support and partner" if value is None else "drop it or set one of them")
        )


def check_vector(name: str, value: torch.Tensor | None, tokens: int) -> None:
    """ValueError unless value is None or has one entry per token."""
    if value is not None and tuple(value.shape) != (tokens,):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; it is ({tokens},), one per token; reshape or gather it"
        )


def check_token_ids(token_ids_T: torch.Tensor | None, tokens: int, *, vocab: VocabAxis, columns: int) -> None:
    """ValueError unless every id is a column of the real vocabulary."""
    if token_ids_T is None:
        return
    check_vector("token_ids_T", token_ids_T, tokens)
    if token_ids_T.is_floating_point() or token_ids_T.dtype == torch.bool:
        raise ValueError(f"token_ids_T: got {token_ids_T.dtype}; ids are integers; convert them with .long()")
    if not tokens:
        return
    low, high = (int(value) for value in token_ids_T.aminmax())
    size = vocab.full_size(columns)
    if low < 0 or high >= size:
        raise ValueError(
            f"token_ids_T: got ids from {low} to {high}; the vocabulary has {size} entries, from 0; "
            "drop prompt and padding rows before the loss"
        )


def check_temperature(name: str, value: float) -> None:
    """ValueError unless value is finite and above 0."""
    if not 0.0 < value < float("inf"):
        raise ValueError(
            f"{name}: got {value!r}; it divides the logits, finite and above 0; 1.0 leaves them as they are"
        )


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, otherwise float32: logits never have fewer bits."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32
