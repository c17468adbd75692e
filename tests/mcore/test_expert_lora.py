"""Adapters of experts on a layer that computes all experts in one call, as Transformer Engine's grouped layer does."""

from types import SimpleNamespace

import torch
from torch import nn

from megatron_paint.mcore.expert_lora import ExpertAdapters

EXPERTS, RANK, HIDDEN, FFN = 3, 2, 4, 5


class Grouped(nn.Module):
    """A frozen linear layer of all experts: tokens, one expert's after another's, and how many each one has."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = torch.randn(EXPERTS, outputs, inputs, dtype=torch.float64)

    def forward(self, tokens, counts):
        parts = tokens.split(counts)
        return torch.cat([part @ weight.t() for part, weight in zip(parts, self.weight, strict=True)]), None


def adapters() -> ExpertAdapters:
    ranks = SimpleNamespace(ep_rank=0, ep_size=1, expert_shards=SimpleNamespace(replica=0))
    sizes = {"gate_up_proj": (HIDDEN, 2 * FFN), "down_proj": (FFN, HIDDEN)}
    pairs = {
        name: tuple(torch.randn(EXPERTS, *shape, dtype=torch.float64) for shape in ((RANK, inputs), (outputs, RANK)))
        for name, (inputs, outputs) in sizes.items()
    }
    return ExpertAdapters(pairs, scale=1.5, ranks=ranks)


def test_grouped_experts_get_their_own_adapters():
    torch.manual_seed(0)
    experts, made = nn.Module(), adapters()
    experts.linear_fc1, experts.linear_fc2 = Grouped(2 * FFN, HIDDEN), Grouped(HIDDEN, FFN)
    made.attach(experts)
    counts = [2, 0, 3]
    for linear, projection, inputs in (("linear_fc1", "gate_up_proj", HIDDEN), ("linear_fc2", "down_proj", FFN)):
        tokens = torch.randn(sum(counts), inputs, dtype=torch.float64)
        layer = getattr(experts, linear)
        parts = tokens.split(counts)
        wanted = torch.cat(
            [
                part @ (layer.weight[e] + 1.5 * made.b[projection][e] @ made.a[projection][e]).t()
                for e, part in enumerate(parts)
            ]
        )
        torch.testing.assert_close(layer(tokens, counts)[0], wanted)
        made.enabled = False
        bare = torch.cat([part @ layer.weight[e].t() for e, part in enumerate(parts)])
        torch.testing.assert_close(layer(tokens, counts)[0], bare)
        made.enabled = True


def test_their_parameters_belong_to_experts():
    """Megatron gives them gradient buffers and an optimiser of their own, and counts each in the gradient's norm."""
    for parameter in adapters().parameters():
        assert not parameter.allreduce
        assert parameter.tensor_model_parallel
