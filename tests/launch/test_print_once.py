"""The store that decides which rank prints: only rank 0 hosts it, and a taken port is an error of the user."""

import socket
import threading

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.launch import print_once
from megatron_paint.launch.rank_environment import RankEnvironment
from tests.support.ports import free_port


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(print_once, "_hosted", None)
    monkeypatch.setattr(print_once, "LINGER", 0.1)
    monkeypatch.setattr(print_once, "COURTESY", 0.1)


@pytest.fixture
def port():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        yield taken.getsockname()[1]


def environment(port, rank=0):
    return RankEnvironment(rank=rank, size=2, local_rank=rank, address="127.0.0.1", port=port)


def test_a_port_that_is_taken(port):
    with pytest.raises(UserError, match=f"rank 0 cannot listen at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} .*set"):
        print_once.host_store(environment(port))


def test_only_rank_0_keeps_the_store(port, monkeypatch):
    print_once.host_store(environment(port, rank=1))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    print_once.host_store(environment(port))
    assert print_once._hosted is None


def test_of_two_ranks_with_one_message_one_prints(capsys):
    port = free_port()
    print_once.host_store(environment(port))
    host, print_once._hosted = print_once._hosted, None  # from here on this is another rank, without the host
    for message in ("one", "two", "one"):
        print_once.print_once(message, environment(port, rank=1))
    assert host is not None
    assert capsys.readouterr().err.splitlines() == ["one", "two"]


def test_rank_0_comes_first(capsys, monkeypatch):
    """Although its error comes later: the console of a job may not show what other ranks print."""
    monkeypatch.setattr(print_once, "COURTESY", 60.0)
    port = free_port()
    print_once.host_store(environment(port))
    host, print_once._hosted = print_once._hosted, None
    other = threading.Thread(target=print_once.print_once, args=("one", environment(port, rank=1)))
    other.start()
    other.join(0.5)
    assert other.is_alive()
    assert host.add(print_once._key("one"), 1) == 1  # as rank 0 does
    other.join(30)
    assert not other.is_alive()
    assert capsys.readouterr().err == ""


def test_a_rank_that_reaches_nobody_prints(capsys, monkeypatch):
    monkeypatch.setattr(print_once, "PATIENCE", 0.3)
    port = free_port()
    print_once.print_once("alone", environment(port, rank=1))
    assert capsys.readouterr().err.splitlines() == ["alone"]
