"""The write behind the training, on one of two ranks whose other rank is played by the test."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.mcore import async_writer
from megatron_paint.mcore.async_writer import Writer
from tests.support.until import until


@dataclass(frozen=True)
class TwoRanks:
    rank: int = 0
    size: int = 2
    host_group: Any = "host"
    writer_group: Any = "writer"


@pytest.fixture
def other(monkeypatch):
    """What the other rank says: whether its thread has ended."""
    said = {"ended": False}
    monkeypatch.setattr(async_writer, "all_ranks_do", lambda ranks, act: [act(), said["ended"]])
    return said


def ended(write: Writer) -> Writer:
    """Lets this rank's thread end."""
    until(lambda: not write._thread.is_alive(), seconds=60, otherwise=lambda: "the thread is still running")
    return write


def test_a_write_has_ended_when_it_has_on_all_ranks(other):
    made, may_end, groups = Writer(TwoRanks()), threading.Event(), []
    assert made.finish(wait=False) is False
    made.start(lambda ranks: (groups.append(ranks.host_group), may_end.wait(60)))
    other["ended"] = True
    assert made.finish(wait=False) is False, "the thread of this rank is still running"
    may_end.set()
    other["ended"] = False
    assert ended(made).finish(wait=False) is False, "the thread of the other rank is still running"
    with pytest.raises(RuntimeError, match="finish it first"):
        made.start(print)
    other["ended"] = True
    assert made.finish(wait=False) is True
    assert made.finish(wait=False) is False, "said once"
    assert groups == ["writer"]


def test_to_wait_takes_no_other_rank(monkeypatch):
    monkeypatch.setattr(async_writer, "all_ranks_do", lambda *_: pytest.fail("it asked another rank"))
    made = Writer(TwoRanks())
    assert made.finish(wait=True) is False
    made.start(lambda ranks: None)
    assert made.finish(wait=True) is True


def failing(error):
    def write(ranks):
        raise error

    return write


def test_an_error_of_a_disk_comes_when_all_have_ended(other):
    made = Writer(TwoRanks())
    made.start(failing(UserError("full")))
    assert ended(made).finish(wait=False) is False
    other["ended"] = True
    with pytest.raises(UserError, match="full"):
        made.finish(wait=False)
    made.start(lambda ranks: None)
    assert ended(made).finish(wait=False) is True


def test_a_bug_is_raised_at_once(other):
    made = Writer(TwoRanks())
    made.start(failing(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        ended(made).finish(wait=False)
