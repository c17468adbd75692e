"""Keys are stable, different sequences have different keys, and draws depend only on the key."""

import subprocess
import sys

import numpy as np
import pytest

from megatron_paint.base.keys import derangement, derive_key, permutation, uniforms


def test_key_is_the_same_on_every_machine_and_version():
    assert derive_key(1, 2, "algebra-0", 0) == 1285028545948796385
    assert derive_key() == 6510301506637419378


def test_key_does_not_depend_on_the_hash_seed():
    code = "from megatron_paint.base.keys import derive_key; print(derive_key('a', 1))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {f"{derive_key('a', 1)}\n"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab",)),
        (("1",), (1,)),
        ((1, 23), (12, 3)),
        (("a", "b"), ("b", "a")),
        ((-1,), (1,)),
        (("",), ()),
        (("\ud800",), ("?",)),
    ],
)
def test_parts_do_not_run_together(one, other):
    assert derive_key(*one) != derive_key(*other)


def test_keys_have_63_bits():
    keys = [derive_key("spread", index) for index in range(2000)]
    assert len(set(keys)) == 2000
    assert min(keys) >= 0
    assert 2**62 < max(keys) < 2**63


@pytest.mark.parametrize("part", [True, 1.0, None, b"a"])
def test_other_types_are_refused(part):
    with pytest.raises(TypeError, match="str and int"):
        derive_key(part)


def test_uniforms_are_a_function_of_the_key():
    assert uniforms(7, 2).tolist() == [0.8720734548204873, 0.29536538151378355]
    assert uniforms(7, 5)[:2].tolist() == uniforms(7, 2).tolist()
    assert uniforms(8, 2).tolist() != uniforms(7, 2).tolist()


def test_uniforms_are_uniform():
    draws = uniforms(derive_key("moments"), 100_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 0.004  # four standard errors of sqrt(1/12 / 100,000)
    assert abs(draws.var() - 1 / 12) < 0.001


def test_permutation_is_one():
    order = permutation(3, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != list(range(1000))
    assert np.array_equal(order, permutation(3, 1000))


@pytest.mark.parametrize("count", [2, 3, 32, 101])
def test_derangement_moves_everything(count):
    for key in range(20):
        partner = derangement(key, count)
        assert sorted(partner.tolist()) == list(range(count))
        assert not np.any(partner == np.arange(count))


def test_derangement_of_three_takes_both_circles():
    assert {tuple(derangement(key, 3).tolist()) for key in range(50)} == {(1, 2, 0), (2, 0, 1)}


def test_derangement_of_one_is_impossible():
    with pytest.raises(ValueError, match="cannot change places"):
        derangement(0, 1)
