"""The metrics of routing: numbers by hand."""

import math

import pytest
import torch

from megatron_paint.mcore.routing import routing_metrics


def test_metrics_by_hand():
    """Two layers of four experts, ten tokens with two experts each."""
    tokens_LE = torch.tensor([[5.0, 5.0, 5.0, 5.0], [10.0, 6.0, 4.0, 0.0]])
    entropy_L = torch.tensor([10 * math.log(4), 10 * math.log(2)])
    assert routing_metrics(tokens_LE, entropy_L, topk=2) == pytest.approx(
        {
            "experts/tokens_mean": 5.0,
            "experts/tokens_max": 10.0,
            "experts/imbalance": (1.0 + 2.0) / 2,
            "experts/idle_share": 1 / 8,
            "router/entropy_mean": 1.5 * math.log(2),
        }
    )
