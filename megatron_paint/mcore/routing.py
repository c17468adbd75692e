"""What the routers of a mixture of experts did in the student's pass: tokens of each expert, entropy of the routers.

Axes: L layers of the model, E experts of a layer, T tokens of a call on this rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks


class RoutingCounts:
    """Counts on the device. Every rank routes tokens that no other rank routes, so the sum over ranks is complete."""

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self._ranks, config = ranks, stage.config
        self._counting = False
        self._topk = config.moe_router_topk
        # Of each layer: the tokens of each expert, and the sum of the entropies of its tokens.
        self._sums_LE = torch.zeros(
            (config.num_layers, (config.num_moe_experts or 0) + 1), dtype=torch.float64, device=ranks.device
        )
        if config.num_moe_experts:
            for number, layer in stage.layers.items():
                router = layer.mlp.router
                router.routing = partial(self._routing, router.routing, number)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts, from zero, what is routed inside with gradients. A recomputed layer is counted once."""
        self._sums_LE.zero_()
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def _routing(
        self, routing: Callable[..., tuple[Tensor, Tensor]], layer: int, logits: Tensor, *rest: Any, **named: Any
    ):
        probabilities_TE, chosen_TE = routing(logits, *rest, **named)
        if self._counting and torch.is_grad_enabled():
            logp_TE = logits.detach().flatten(0, -2).log_softmax(-1)
            self._sums_LE[layer, :-1] += chosen_TE.sum(0)
            self._sums_LE[layer, -1] -= (logp_TE.exp() * logp_TE).sum()
        return probabilities_TE, chosen_TE

    def metrics(self) -> dict[str, float]:
        """The metrics of the last counted pass, on every rank; empty for a dense model. All ranks call together."""
        if self._sums_LE.size(1) == 1:
            return {}
        sums_LE = self._sums_LE.cpu()
        dist.all_reduce(sums_LE, group=self._ranks.host_group)
        return routing_metrics(sums_LE[:, :-1], sums_LE[:, -1], topk=self._topk)


def routing_metrics(tokens_LE: Tensor, entropy_L: Tensor, *, topk: int) -> dict[str, float]:
    """The metrics of a step. tokens_LE: of each expert; entropy_L: in nats, summed over the tokens of a layer."""
    mean_L = tokens_LE.mean(1)
    return {
        "experts/tokens_mean": float(mean_L.mean()),
        "experts/tokens_max": float(tokens_LE.max()),
        "experts/imbalance": float((tokens_LE.amax(1) / mean_L).mean()),
        "experts/idle_share": float((tokens_LE == 0).double().mean()),
        "router/entropy_mean": float(entropy_L.sum() / (tokens_LE.sum() / topk)),
    }
