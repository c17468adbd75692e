"""Checkpoints between one stage, stages, chunks, uneven stages, ranks that share rows, and groups of replicas.

The next step is the same.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.mcore.layouts import layout_of, run_worker
from tests.mcore.pipeline_checkpoint_worker import cases_at
from tests.support.exports import same, weights

BETWEEN = [  # written at, read at
    ("pp2-vp2", "pp2-vp2"),
    ("pp2-vp2", "tp1"),
    ("pp2-vp2", "pp2"),
    ("pp2-vp2", "tp2-pp2-vp2-sp"),
    ("pp2-vp2-dp2", "tp1"),
    ("tp1", "pp2-vp2-dp2"),
    ("tp1", "pp2-vp2"),
    ("pp2", "pp2-vp2"),
    ("pp4-ends", "pp2-first4"),
    ("pp2-vp2-uneven", "pp4-ends"),
    ("pp2-first4", "pp2-vp2-uneven"),
    ("pp2-vp2-uneven", "pp2-vp2-uneven"),
    ("pp2-vp2-uneven", "tp1"),
    ("tp1", "pp2-vp2-uneven"),
    ("cp2-dp2", "cp2-dp2"),
    ("cp2-dp2", "pp2-vp2"),
    ("pp2-vp2-dp2", "tp2-cp2-sp"),
    ("dp4-instances2", "dp4-instances2"),
    ("dp4-instances2", "pp2-vp2"),
    ("tp1", "dp4-instances2"),
    ("pp2-vp2-dp2", "tp2-cp2-instances2"),
]


@pytest.fixture(scope="module")
def written(checkpoints, tmp_path_factory):
    """(checkpoints of a layout, what its own second step made), by the layout and the layers of the model."""

    @cache
    def of(layout: str, layers: int) -> tuple[Path, Path]:
        made = tmp_path_factory.mktemp(f"{layout}-saved"), tmp_path_factory.mktemp(f"{layout}-out")
        run_worker("pipeline_checkpoint_worker", layout, "save", layers, checkpoints, *made)
        return made

    return of


@pytest.mark.parametrize(("writer", "reader"), BETWEEN, ids=lambda layout: layout)
def test_next_step_is_the_same(writer, reader, checkpoints, written, tmp_path):
    layers = max(layout_of(name).layers for name in (writer, reader))
    saved, out = written(writer, layers)
    run_worker("pipeline_checkpoint_worker", reader, "load", layers, checkpoints, saved, tmp_path)
    losses = torch.load(tmp_path / "losses.pt"), torch.load(out / "losses.pt")
    for case in min(cases_at(layout_of(writer)), cases_at(layout_of(reader)), key=len):
        found, wanted = weights(tmp_path / case.name), weights(out / case.name)
        assert found.keys() == wanted.keys()
        if writer == reader:
            assert losses[0][case.name] == losses[1][case.name]
            assert same(found, wanted)
            continue
        assert losses[0][case.name] == pytest.approx(losses[1][case.name], rel=1e-5, abs=1e-6)
        for name, tensor in wanted.items():
            assert (found[name] - tensor).norm() <= 1e-7 * tensor.norm(), (case.name, name)
