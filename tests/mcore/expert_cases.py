"""The cases of a mixture of experts, which every layout of experts runs and plain torch beside it."""

from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.mcore import parity_cases as parity
from tests.mcore.layouts import Layout
from tests.mcore.parity_cases import Case

EXPERTS = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
CASES = (
    Case(name="full-initial-sgd", experts=True, tied=False, teacher="initial", optimizer="sgd", lr=0.3, offload=True),
    Case(
        name="full-ema-clip-distributed",
        experts=True,
        tied=True,
        teacher="ema",
        optimizer="adam",
        clip_grad=0.5,
        weight_decay=0.3,
        distributed_optimizer=True,
        overlap_grad_reduce=True,
    ),
    Case(name="full-ema-clip-adam", experts=True, tied=True, teacher="ema", optimizer="adam", clip_grad=0.5),
    Case(name="full-one-sample", experts=True, tied=True, teacher="initial", optimizer="sgd", lr=0.3, num_samples=1),
    Case(name="lora-ema-adam", experts=True, tied=True, teacher="ema", optimizer="adam", lora=True),
    Case(
        name="lora-experts-ema-distributed",
        experts=True,
        tied=False,
        teacher="ema",
        optimizer="adam",
        lora=True,
        adapts_experts=True,
        distributed_optimizer=True,
        clip_grad=0.5,
    ),
    Case(
        name="lora-experts-initial-sgd",
        experts=True,
        tied=False,
        teacher="initial",
        optimizer="sgd",
        lr=0.5,
        lora=True,
        adapts_experts=True,
    ),
    Case(name="sft-sgd", experts=True, tied=False, teacher="none", optimizer="sgd", lr=5e-2),
    Case(
        name="grpo-kl-sgd",
        experts=True,
        tied=False,
        teacher="initial",
        optimizer="sgd",
        lr=0.15,
        grpo={"updates_per_batch": 2, "clip_low": 0.01, "clip_high": 0.015, "kl_weight": 0.3, "importance_limit": 1.2},
    ),
)


def fits(case: Case, layout: Layout) -> bool:
    """Adapters on experts need each expert complete on a rank, and several instances a distributed optimiser."""
    if layout.instances > 1 and not case.distributed_optimizer:
        return False
    return not case.adapts_experts or (layout.etp or layout.tp) == 1


def make_checkpoints(folder: Path) -> None:
    """Two sets of weights, `start` and `moved`, of a tied and an untied mixture.

    The tied one scales the probabilities of a token's experts to a sum of 1, the other one does not.
    """
    for tied in (True, False):
        for seed, name in ((0, "start"), (1, "moved")):
            torch.manual_seed(seed)
            model = Qwen3MoeForCausalLM(
                Qwen3MoeConfig(**parity.SIZES, **EXPERTS, norm_topk_prob=tied, tie_word_embeddings=tied)
            )
            with torch.no_grad():
                for parameter, value in model.named_parameters():
                    if parameter.endswith("mlp.gate.weight"):  # routers that prefer some experts clearly
                        value.mul_(5)
            if name == "moved":
                start = Qwen3MoeForCausalLM.from_pretrained(parity.checkpoint(folder, "start", tied, experts=True))
                with torch.no_grad():
                    for p, q in zip(model.parameters(), start.parameters(), strict=True):
                        p.copy_(q + 0.1 * p)
            model.save_pretrained(parity.checkpoint(folder, name, tied, experts=True))
