"""Stored tensors against the expected ones: missing, surplus and wrong shapes, in this order."""

from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.expected_tensors import check_tensors, tensor_problems

EXPECTED = {"a": (2, 3), "b": (4,), "c": (5,)}


def test_equal_tensors_have_no_problem():
    assert tensor_problems({"c": (5,), "a": (2, 3), "b": (4,)}, EXPECTED) == []
    check_tensors(Path("model"), EXPECTED, EXPECTED, config="config.json")


def test_every_kind_of_problem():
    assert tensor_problems({"a": (3, 2), "c": (5,), "x": (1,)}, EXPECTED) == [
        "b is missing",
        "x does not belong to the model of the config",
        "a has shape (3, 2), but the config expects (2, 3)",
    ]


def test_the_error_has_the_first_problems_of_each_kind():
    """A surplus name shows under which name a missing tensor is stored."""
    with pytest.raises(UserError) as caught:
        check_tensors(Path("model"), {"x": (1,)}, EXPECTED | {"d": (6,)}, config="config.json", notes=["it is old"])
    assert str(caught.value) == (
        "model is not a model of config.json: a is missing; b is missing; c is missing; x does not belong to the model "
        "of the config; and 1 more; it is old"
    )
