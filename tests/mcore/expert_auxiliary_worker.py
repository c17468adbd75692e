"""At one layout: gradients with and without a loss of the routers, and the micro-batches of all replicas."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses.objectives import CrossEntropyLoss
from megatron_paint.mcore.batch import MicroBatch, make_micro_batches
from megatron_paint.mcore.context import ContextGroup
from megatron_paint.mcore.policy import MegatronPolicy, _student_sequences
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.records import Sample
from tests.mcore.expert_cases import CASES
from tests.mcore.layouts import layout_of
from tests.mcore.parity_worker import gradients, records, settings_of

COEFFICIENT = 0.5
KINDS = {
    "none": {},
    "aux": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": COEFFICIENT},
    "z": {"moe_z_loss_coeff": COEFFICIENT},
}


def main() -> None:
    layout, folder, out = layout_of(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    (case,) = (case for case in CASES if case.name == "sft-sgd")
    found = {}
    for kind, changes in KINDS.items():
        settings = settings_of(case, folder, layout.megatron)
        settings = dataclasses.replace(settings, megatron=dataclasses.replace(settings.megatron, **changes))
        policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
        samples = records(0, case)
        loss = CrossEntropyLoss(chunk_bytes=1e9)
        policy.backward(samples, loss, policy.teacher_states(samples, loss))
        found[kind] = gradients(policy)
    found["batches"] = [batch for replica in range(ranks.dp_size) for batch in micro_batches(policy, samples, replica)]
    if ranks.rank == 0:
        torch.save(found, out / "found.pt")
    stop_ranks()


def micro_batches(
    policy: MegatronPolicy, samples: Sequence[Sample], replica: int
) -> list[tuple[list[int], tuple[int, ...]]]:
    """All tokens of each micro-batch of a replica and the lengths of its rows, padding included."""
    forward, context = policy.forward, policy.forward.context

    def made(context: ContextGroup | None) -> list[MicroBatch]:
        return make_micro_batches(
            _student_sequences(samples),
            policy._assignment(samples),
            replica=replica,
            limit=forward.micro_batch_tokens,
            multiple=forward.token_multiple,
            context=context,
            device=policy.ranks.device,
            in_groups_of=forward.in_groups_of,
        )

    if context is None:
        return [(batch.ids_L.tolist(), batch.rows.packed_lengths) for batch in made(None)]
    found = []
    for slices in zip(*(made(dataclasses.replace(context, rank=rank)) for rank in range(context.size)), strict=True):
        rows = slices[0].rows
        ids_T = torch.cat([part.ids_L for part in slices])[rows.context.gathered_T]
        found.append((ids_T.tolist(), rows.packed_lengths))
    return found


if __name__ == "__main__":
    main()
