"""Trains with the optimiser's state in host memory, or without: LAYOUT PART CHECKPOINTS SAVED OUT.

PART: `plain` and `all` train 2N steps, without and with offloading; `none` and `first` save after 0 and N steps; `rest`
resumes; `again` loads and saves.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import layout_of
from tests.mcore.offloaded_optimizer import stand_in_for_gpu_memory
from tests.mcore.parity_worker import records, set_adapters, settings_of

HALF = 2
COMMON = {"teacher": "ema", "optimizer": "adam", "distributed_optimizer": True, "eps": 1e-8}
CASES = (
    parity.Case(name="full", tied=True, **COMMON),
    parity.Case(name="clipped", tied=False, clip_grad=1e-3, weight_decay=0.1, **COMMON),
    parity.Case(name="lora", tied=True, lora=True, **COMMON),
)
EXPERTS = (parity.Case(name="experts", tied=False, experts=True, **COMMON),)
MOVED = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "pin_cpu_grads": False}


def moved_settings(case: parity.Case) -> dict:
    """One case has an optimiser for each weight, so that copies overlap with steps; on a CPU they come in order."""
    return MOVED | {"overlap_cpu_optimizer_d2h_h2d": case.name == "clipped"}


def make_policy(case, checkpoints: Path, layout, ranks, *, moved: bool) -> MegatronPolicy:
    settings = settings_of(case, checkpoints, layout.megatron)
    settings = replace(
        settings,
        model=replace(settings.model, dtype="bfloat16"),
        megatron=replace(settings.megatron, **moved_settings(case) if moved else {}),
    )
    policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
    set_adapters(policy)
    policy.optimizer.reload_model_params()
    return policy


def host_bytes(policy: MegatronPolicy) -> tuple[int, int]:
    """The bytes that this rank's optimisers hold in host memory, and the number of their weights."""
    size = weights = 0
    for optimizer in (one.optimizer for one in policy.optimizer.chained_optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        copies = [*optimizer.param_to_fp32_param.values(), *optimizer.cpu_copy_map_grad.values()]
        size += sum(tensor.nbytes for tensor in (*moments, *copies))
        weights += sum(p.numel() for p in parameters)
    return size, weights


def main() -> None:
    layout, part = layout_of(sys.argv[1]), sys.argv[2]
    checkpoints, saved, out = (Path(path) for path in sys.argv[3:6])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    if part != "plain":
        stand_in_for_gpu_memory()
    found = {}
    for case in EXPERTS if layout.ep > 1 else CASES:
        policy = make_policy(case, checkpoints, layout, ranks, moved=part != "plain")
        loss = DistillationLoss(
            config=InterpolationLossConfig(**case.loss_settings), chunk_bytes=4e3, token_temperature=1.1
        )
        start = policy.load(saved / case.name)["step"] if part in ("rest", "again") else 0
        end = {"none": 0, "first": HALF, "again": start}.get(part, 2 * HALF)
        reports = [policy.update(records(step, case), loss, lr=case.lr) for step in range(start, end)]
        found[case.name] = {
            "losses": [[score.loss_sum for score in report.scores] for report in reports],
            "norms": [report.grad_norm for report in reports],
            "optimisers": [type(one.optimizer).__name__ for one in policy.optimizer.chained_optimizers],
        }
        if part == "all":
            found[case.name]["host"] = host_bytes(policy)
        if part in ("none", "first", "again"):
            folder = (out if part == "again" else saved) / case.name
            policy.save(folder, {"step": end})
            policy.finish_save(wait=True)
            continue
        policy.export(out / case.name)
    if ranks.rank == 0:
        torch.save(found, out / "found.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
