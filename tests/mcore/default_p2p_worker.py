"""One backward pass at PP 2 x VP 2, with our way to exchange tensors or with Megatron's default; rank 0 writes it."""

import faulthandler
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.losses.objectives import CrossEntropyLoss
from megatron_paint.mcore import forward_pass, model
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.mcore.teacher import TeacherStates
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.records import Problem, Rollout, Sample
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import layout_of
from tests.mcore.parity_worker import gradients, settings_of

LENGTH = 12  # tokens of each prompt and response: all micro-batches have one shape, so that nothing but values differ
SECONDS = 60  # that a pass may take


def equal_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, parity.SIZES["vocab_size"], (4, 2, LENGTH), generator=generator).tolist()
    return [
        Sample(
            problem=Problem(id=str(i), problem="", solution="", answer=""),
            key=i,
            rollout=Rollout(problem_id=str(i), prompt_ids=tuple(prompt), response_ids=tuple(response), finished=True),
        )
        for i, (prompt, response) in enumerate(rows)
    ]


def main() -> None:
    layout, folder, out, ours = layout_of(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "ours"
    torch.set_num_threads(1)
    if not ours:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        right = model._pipeline_settings
        model._pipeline_settings = lambda megatron: {
            name: value for name, value in right(megatron).items() if name not in ("overlap_p2p_comm", "batch_p2p_comm")
        }
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    case = parity.Case(name="p2p", tied=False, teacher="none", optimizer="sgd")
    settings = settings_of(case, folder, layout.megatron)
    policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
    assert policy.stage.config.batch_p2p_comm is (not ours)
    none = TeacherStates(hidden_NH=None, full_hidden_NH=None, output_weight_VH=None)
    out.with_name(f"begun{ranks.rank}").touch()
    marks: list[None] = []
    with patch.object(forward_pass, "mark_progress", lambda: marks.append(None)):
        scores = policy.backward(equal_samples(), CrossEntropyLoss(chunk_bytes=1e9), none)
    found = {"losses": [score.loss_sum for score in scores], "gradients": gradients(policy), "marks": len(marks)}
    if ranks.rank == 0:
        torch.save(found, out)
    stop_ranks()


if __name__ == "__main__":
    main()
