"""A mixture of experts at every layout against plain torch over `transformers`' Qwen3-MoE."""

import pytest
import torch

from tests.mcore.expert_cases import CASES, fits, make_checkpoints
from tests.mcore.layouts import EXPERT_LAYOUTS, run_worker
from tests.mcore.plain_runs import assert_equals_plain, plain_run

NAMED = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def plain(checkpoints):
    """Results of plain torch by case, computed once."""
    torch.set_num_threads(1)
    return {case.name: plain_run(case, checkpoints) for case in CASES}


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """Output folder of all cases at a layout."""
    made = {}

    def of(layout: str):
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            run_worker("expert_worker", layout, checkpoints, made[layout])
        return made[layout]

    return of


FITTING = [(name, case) for name, at in EXPERT_LAYOUTS.items() for case in NAMED if fits(NAMED[case], at)]


@pytest.mark.parametrize(("layout", "name"), FITTING)
def test_equals_plain_torch(layout, name, outputs, plain):
    assert_equals_plain(NAMED[name], outputs(layout), plain[name])
