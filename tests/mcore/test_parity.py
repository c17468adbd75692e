"""Megatron at every layout against plain torch over `transformers`' Qwen3: losses, gradients, changes of weights."""

import itertools
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.mcore import parity_cases as parity
from tests.mcore.layouts import INSTANCES, LAYOUTS, PIPELINES, run_worker
from tests.mcore.plain_runs import assert_equals_plain, plain_run


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """Output folder of a case at a layout: one process group runs all cases of a part (`parity_cases.part_of`)."""
    made = {}

    def of(layout: str, name: str) -> Path:
        part = parity.part_of(layout, name)
        if (layout, part) not in made:
            out = made[layout, part] = tmp_path_factory.mktemp(f"{layout}-{part}")
            run_worker("parity_worker", layout, checkpoints, out, part)
        return made[layout, part]

    return of


def at_all_layouts(names: Iterable[str], *, pipelines: bool = False) -> list:
    """(layout, case) for a test; `make test` leaves out the cases that do not touch a layout."""
    pairs = list(itertools.product(LAYOUTS, names))
    pairs += [(layout, case.name) for layout in PIPELINES | INSTANCES for case in parity.cases_at(layout) if pipelines]
    marks = [() if parity.touches(*pair) else pytest.mark.long for pair in pairs]
    return [pytest.param(*pair, marks=mark, id="-".join(pair)) for pair, mark in zip(pairs, marks, strict=True)]


@pytest.fixture(scope="module")
def plain(checkpoints):
    """Results of plain torch for the name of a case, computed once."""
    torch.set_num_threads(1)
    return cache(lambda name: plain_run(CASES[name], checkpoints))


CASES = {case.name: case for case in (*parity.CASES, *parity.DEEP_CASES.values())}


@pytest.mark.parametrize(("layout", "name"), at_all_layouts(parity.BY_NAME, pipelines=True))
def test_equals_plain_torch(layout, name, outputs, plain):
    assert_equals_plain(CASES[name], outputs(layout, name), plain(name))


@pytest.mark.parametrize(("layout", "name"), at_all_layouts(parity.NOT_FINITE))
def test_what_is_not_finite_touches_nothing(layout, name, outputs):
    """It stops all ranks alike, and names a loss by rank, micro-batch and problem; weights, optimiser and teacher stay,
    and the updates after it are, to the bit, those of a policy that never met it."""
    told = torch.load(outputs(layout, name) / "not_finite.pt")[name]
    assert all(entry["told"] == told[0]["told"] for entry in told)
    loss, gradient = told[0]["told"]
    assert re.fullmatch(r"loss is not finite on rank \d+, micro-batch \d+, problem '2'", loss)
    assert re.fullmatch(r"the gradient's norm is (nan|inf)", gradient)
    for entry in told:
        assert entry["stays"] == [True, True]
        assert entry["continues"]
        assert entry["moves"]


def test_grpo_s_clip_is_met(plain):
    """The second update clips some tokens and not all, so that a clip that does nothing cannot pass."""
    tokens = sum(len(response) for *_, response in parity.step_samples(0))
    first, second = plain("grpo-kl-sgd")["clipped"][:2]
    assert first == 0
    assert 0 < second < tokens


def test_teacher_kinds_differ(plain):
    """The teacher kinds give different losses, so a teacher that is not the one asked for cannot pass."""
    names = ("full-one-sample", "full-tied-ema-adam", "full-current-distributed-adam")
    full = [plain(name)["losses"][0][0] for name in names]
    assert min(abs(a - b) for a, b in itertools.combinations(full, 2)) > 1e-3
    lora = torch.tensor([plain(name)["losses"][0] for name in ("lora-initial-adam", "lora-current-distributed-adam")])
    assert (lora[0] - lora[1]).abs().min() > 1e-3
