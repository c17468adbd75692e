"""Gradients of a step with the output layer's in Megatron's buffer, and carried by autograd; written by rank 0."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.losses.output_layer import products as gemm
from megatron_paint.mcore.hf_checkpoint import load_stage
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import layout_of
from tests.mcore.parity_worker import accumulate, gradients, records, settings_of

LOSS_SCALE = 256.0


def run(folder: Path, ranks, megatron: dict, *, tied: bool, overlap: bool, scale: float, buffer: bool) -> dict:
    """Whole gradients by name after one step's passes, the loss scale taken out."""
    case = parity.Case(name="main-grad", tied=tied, teacher="current", optimizer="sgd", overlap_grad_reduce=overlap)
    settings = settings_of(case, folder, megatron)
    shape = read_shape(settings.model.hf_path)
    policy = MegatronPolicy(settings, shape, ranks)
    load_stage(policy.stage, parity.checkpoint(folder, "moved", tied), shape, ranks)
    policy.stage.config.grad_scale_func = lambda loss: loss * scale
    loss = DistillationLoss(config=InterpolationLossConfig(**parity.LOSS), chunk_bytes=4e3, token_temperature=1.1)
    found, original = [], gemm.main_grad_of
    gemm.main_grad_of = lambda weight: found.append(buffer) or (original(weight) if buffer else None)
    try:
        accumulate(policy, records(0, case), loss)
        output = [p for p in policy.stage.parameters() if getattr(p, "is_embedding_or_output_parameter", False)]
        assert not buffer or not found or any(p.grad_added_to_main_grad for p in output)
        first = gradients(policy)
        # A second step starts from zeroed buffers, whatever the first one left on the parameters.
        accumulate(policy, records(0, case), loss)
        again = gradients(policy)
    finally:
        gemm.main_grad_of = original
    assert all(torch.equal(first[name], again[name]) for name in first)
    policy.stage.config = replace(policy.stage.config, calculate_per_token_loss=False)
    refusal = ""
    try:
        accumulate(policy, records(0, case), loss)
    except ValueError as error:
        refusal = str(error)
    assert "a mean of means" in refusal
    return {name: gradient / scale for name, gradient in first.items()}


def main() -> None:
    layout, folder, out = layout_of(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    for tied in (True, False):
        results = {
            name: run(folder, ranks, layout.megatron, tied=tied, **options)
            for name, options in {
                "autograd": {"overlap": False, "scale": 1.0, "buffer": False},
                "buffer": {"overlap": False, "scale": 1.0, "buffer": True},
                "overlap": {"overlap": True, "scale": LOSS_SCALE, "buffer": True},
            }.items()
        }
        if ranks.rank == 0:
            torch.save(results, out / f"{'tied' if tied else 'untied'}.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
