"""Checkpoints of a mixture of experts: any layout loads what any other saved, and resumes to the bit at its own."""

import json

import pytest
import torch

from megatron_paint.mcore.checkpoint import _is_engine_state
from tests.mcore.expert_cases import fits, make_checkpoints
from tests.mcore.expert_checkpoint_worker import CASES
from tests.mcore.layouts import EXPERT_LAYOUTS, run_worker
from tests.support.exports import same, weights

# What each layout loads beside its own; these three saved the optimiser's state in one part, in two, and by stages.
WRITERS = ("experts-tp1", "tp2-ep2-etp1", "pp2-vp2-ep2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(saved checkpoints, output of the unbroken run at a layout, output of the runs that load) of a reader."""
    checkpoints, saved = (tmp_path_factory.mktemp(name) for name in ("hf", "saved"))
    make_checkpoints(checkpoints)
    unbroken, loaded = {}, {}

    def of(reader: str):
        for layout in (*WRITERS, reader):
            if layout not in unbroken:
                unbroken[layout] = tmp_path_factory.mktemp(f"unbroken-{layout}")
                run_worker("expert_checkpoint_worker", layout, checkpoints, saved, unbroken[layout])
        if reader not in loaded:
            loaded[reader] = tmp_path_factory.mktemp(f"loaded-{reader}")
            writers = dict.fromkeys((*WRITERS, reader))
            run_worker("expert_checkpoint_worker", reader, checkpoints, saved, loaded[reader], *writers)
        return saved, unbroken, loaded[reader]

    return of


PAIRS = [
    pytest.param(reader, case, id=f"{reader}-{case.name}")
    for reader, layout in EXPERT_LAYOUTS.items()
    for case in CASES
    if fits(case, layout)
]


@pytest.mark.parametrize(("reader", "case"), PAIRS)
def test_the_next_step_is_the_same(reader, case, runs):
    """Of a run that another layout saved, compared with the run at that layout that was never broken."""
    _, unbroken, loaded = runs(reader)
    for writer in dict.fromkeys((*WRITERS, reader)):
        if not fits(case, EXPERT_LAYOUTS[writer]):
            continue
        wanted = torch.load(unbroken[writer] / f"{case.name}-unbroken.pt")
        found = torch.load(loaded / f"{case.name}-{writer}.pt")
        ours, theirs = weights(loaded / f"{case.name}-{writer}"), weights(unbroken[writer] / f"{case.name}-unbroken")
        assert ours.keys() == theirs.keys()
        if writer == reader:
            assert found == wanted
            assert same(ours, theirs)
            continue
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-7 * tensor.norm(), (writer, name)


def test_a_checkpoint_names_the_experts_sizes(runs):
    saved, *_ = runs("experts-tp1")
    sizes = json.loads((saved / "tp2-ep2-etp1" / "full-plain" / "run_state.json").read_text())["model"]
    wanted = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": False}
    assert {name: sizes[name] for name in wanted} == wanted


def test_entries_of_transformer_engine():
    """Its layer with all experts of a rank has an entry for each expert, numbered from the second one on."""
    layer = "decoder.layers.0.mlp.experts.linear_fc1."
    assert _is_engine_state(f"{layer}_extra_state")
    assert _is_engine_state(f"{layer}_extra_state12")
    assert not _is_engine_state(f"{layer}weight12")
