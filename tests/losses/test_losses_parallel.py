"""Reference, fused loss and token log-probabilities at TP 1, 2 and 4 against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch

from megatron_paint.losses import WholeVocab
from megatron_paint.losses.elementwise.divergences import DIVERGENCES
from tests.losses.losses_cases import CASES, LENGTHS, short
from tests.losses.losses_compare import EXACT, dense_case, measure_case
from tests.losses.losses_ranks import DTYPES, SHARDED_RUNS, is_long, measure_layout

TOLERANCE = {"float64": 1e-12, "float32": 5e-6}


@pytest.fixture(scope="module")
def layouts(request, tmp_path_factory):
    """What every rank of TP 2 and TP 4 measured of the runs that are selected."""
    runs = {2: [], 4: []}
    for item in request.session.items:
        if getattr(item, "function", None) is test_sharded_vocabulary_equals_dense:
            ranks, dtype, name = (item.callspec.params[key] for key in ("ranks", "dtype", "name"))
            runs[ranks].append((dtype, name))
    return {ranks: measure_layout(ranks, runs[ranks], tmp_path_factory.mktemp(f"tp{ranks}")) for ranks in runs}


def _assert_close(errors: dict[str, float], tolerance: float) -> None:
    limits = {key: 0.0 if key.endswith(EXACT) else tolerance for key in errors}
    wrong = {key: value for key, value in errors.items() if not value <= limits[key]}
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_whole_vocabulary_equals_dense(name, dtype):
    case = CASES[name]
    errors = measure_case(case, DTYPES[dtype], WholeVocab(valid_size=case.valid_size), slice(None))
    _assert_close(errors, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("ranks", "dtype", "name"),
    [pytest.param(*run, marks=[pytest.mark.long] if is_long(*run) else []) for run in SHARDED_RUNS],
)
def test_sharded_vocabulary_equals_dense(layouts, ranks, dtype, name):
    for found in layouts[ranks]:
        _assert_close(found["cases"][f"{name} {dtype}"], TOLERANCE[dtype])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_to_the_bit(layouts, ranks):
    assert [found["spread"] for found in layouts[ranks]] == [0.0] * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_partial_hidden_gradients_add_up(layouts, ranks):
    for found in layouts[ranks]:
        assert found["partial_hidden"]["total"] <= 1e-13
        assert found["partial_hidden"]["part"] > 0.1


@pytest.mark.parametrize("name", map(short, DIVERGENCES))
@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_all_reduce_has_the_value_and_not_the_gradient(layouts, ranks, name):
    """The mistake that a value test cannot see: the gradient check above would fail on every rank."""
    for found in layouts[ranks]:
        assert found["plain_all_reduce"][name]["value"] <= 1e-12
        assert found["plain_all_reduce"][name]["gradient"] > 0.1


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_are_few_and_small(layouts, ranks):
    """Chunks of 6 tokens: rollouts of 7, 1, 12 and 3 tokens make 2 + 1 + 2 + 1 of them where rollouts stay whole."""
    for found in layouts[ranks]:
        # positions none: chunks cross rollouts, ceil(23 / 6) = 4 of them, two collectives each.
        assert found["traffic"]["forward-none"] == {"calls": 8, "gathers": 4, "bytes_per_token": 4 * (6 + 2 + 1)}
        for name in ("clipped", "jsd-cut"):
            traffic = found["traffic"][name]
            assert traffic["gathers"] == 6
            # 1 + 2 selected rows of the two long rollouts are done again, a quarter of a chunk at a time.
            assert traffic["calls"] == 2 * 6 + 3
            assert traffic["bytes_per_token"] <= 64


@pytest.mark.parametrize("ranks", [2, 4])
def test_empty_micro_batch(layouts, ranks):
    assert [found["empty"] for found in layouts[ranks]] == [{"loss": 0.0, "dweight": 0.0}] * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_derive_the_same_chunks(layouts, ranks):
    assert max(found["derived_chunks"] for found in layouts[ranks]) <= 1e-13


def test_cases_are_not_trivial():
    """The clip clips, long rollouts are cut, some positions are selected and some not."""
    assert torch.tensor(LENGTHS).max() > 6
    clipped = dense_case(CASES["clipped"], torch.float64)
    assert 0 < clipped.clipped_entries_T.sum() < 48 * sum(LENGTHS)
    for name in DIVERGENCES:
        bounded = dense_case(CASES[f"{short(name)}-token-clip"], torch.float64)
        assert 2 < bounded.clipped_entries_T.sum() < sum(LENGTHS) - 2
    threshold = dense_case(CASES["clipped-threshold"], torch.float64)
    assert 0 < threshold.selected_T.sum() < sum(LENGTHS)
