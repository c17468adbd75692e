"""Rows of logits that are hard to draw from, and the rule of a draw in numpy, float64.

Axes: R rows, V vocabulary.
"""

import numpy as np
import torch

REAL = 151_936  # Qwen3's vocabulary


def normal(rows, vocabulary, *, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, vocabulary), generator=generator) * spread


def half_infinite(rows, vocabulary):
    """Half of the entries are minus infinity, never the first one."""
    dropped_RV = normal(rows, vocabulary, spread=1.0, seed=1) < 0
    dropped_RV[:, 0] = False
    return normal(rows, vocabulary, spread=3.0).masked_fill(dropped_RV, -torch.inf)


def one_hot(rows, vocabulary):
    """Row r allows only token 7 r, or the last one."""
    logits_RV = torch.full((rows, vocabulary), -torch.inf)
    logits_RV[torch.arange(rows), (7 * torch.arange(rows)).clamp_max(vocabulary - 1)] = 3.0
    return logits_RV


def plateau(rows, vocabulary):
    """A few large entries, and then equal ones, among which the nucleus ends."""
    logits_RV = normal(rows, vocabulary, spread=0.5).clamp_max(0.25)
    logits_RV[:, 3:11] = 6.0
    return logits_RV


# Rows by name. Values of top-p end the nucleus among equal entries in the last four.
ROWS = {
    "flat": lambda rows, vocabulary: normal(rows, vocabulary, spread=0.3),
    "wide": lambda rows, vocabulary: normal(rows, vocabulary, spread=3.0),
    "peaked": lambda rows, vocabulary: normal(rows, vocabulary, spread=7.0),
    "half infinite": half_infinite,
    "one hot": one_hot,
    "one large": lambda rows, vocabulary: one_hot(rows, vocabulary).clamp_min(-20.0),
    "bfloat16": lambda rows, vocabulary: normal(rows, vocabulary, spread=3.0).bfloat16().float(),
    "bfloat16, flat": lambda rows, vocabulary: normal(rows, vocabulary, spread=0.3).bfloat16().float(),
    "plateau": plateau,
    "equal": lambda rows, vocabulary: torch.full((rows, vocabulary), -1.5),
}


def wanted_tokens(logp_V, uniform, *, top_p, top_k):
    """The tokens that a draw may give: one, or two if top-k or top-p ends among equal entries.

    A sort puts equal entries in an order that is not defined. The two tokens are those of the extremes: low ids first,
    and high ids first.
    """
    logp_V = logp_V.double().numpy()
    tokens = {_token(logp_V, ids, uniform, top_p=top_p, top_k=top_k) for ids in _orders(logp_V)}
    return min(tokens), max(tokens)


def _orders(logp_V):
    ids = np.arange(len(logp_V))
    return np.lexsort((ids, -logp_V)), np.lexsort((-ids, -logp_V))


def _token(logp_V, descending, uniform, *, top_p, top_k):
    kept = descending[: top_k or None]
    p = np.exp(logp_V[kept])
    p /= p.sum()
    kept = kept[np.cumsum(p) - p < top_p] if top_p < 1 else kept
    in_order = np.sort(kept)
    cumulative = np.cumsum(np.exp(logp_V[in_order]))
    return int(in_order[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])
