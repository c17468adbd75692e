"""Work of the preflight that hangs or is slow, and the deadlines of its phases."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_paint.launch.preflight import command, coordinator, store, time_limit, timed_process, worker
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.options import LIMIT_SECONDS, parse
from megatron_paint.launch.preflight.result import faulty_nodes
from megatron_paint.launch.preflight.timed_process import TimedProcess, end_all, run_timed

ROOT = Path(__file__).parents[2]
NEEDED = ["--run", "r", "--rendezvous", "h:29500", "--settings", "s.yaml"]


def test_a_timed_process_returns_its_value_or_its_error():
    assert run_timed(lambda: 7, 20).value == 7
    failed = run_timed(lambda: [][0], 20)
    assert (failed.kind, failed.problem) == ("error", "list index out of range")


def test_a_timed_process_that_hangs_is_ended():
    hangs = TimedProcess(lambda report: (report("half"), time.sleep(600)))
    assert hangs._receiver.poll(60)  # it has reported
    began = time.monotonic()
    outcome = hangs.outcome(began + 0.3)
    assert (outcome.kind, outcome.reached) == ("stalled", "half")
    assert time.monotonic() - began < 50
    end_all()
    assert not hangs._process.is_alive()


def test_processes_that_take_long_to_die_hold_no_answer_up(monkeypatch):
    """Processes that hold a GPU may do so. An answer waits for none of them; the end waits once for all of them."""
    fork, now, did = multiprocessing.get_context("fork").Process, SimpleNamespace(seconds=0.0), []
    kill, join = fork.kill, fork.join

    def join_in_vain(process, timeout):
        did.append("join")
        now.seconds += timeout

    processes = [TimedProcess(lambda _: time.sleep(600)) for _ in range(8)]
    monkeypatch.setattr(fork, "kill", lambda process: did.append("kill"))
    monkeypatch.setattr(fork, "join", join_in_vain)
    outcomes = [each.outcome(time.monotonic()) for each in processes]
    assert [outcome.kind for outcome in outcomes] == ["stalled"] * 8
    assert did == ["kill"] * 8
    monkeypatch.setattr(timed_process, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    end_all()
    assert did == ["kill"] * 16 + ["join"] * 8
    assert now.seconds == timed_process.END_SECONDS
    for each in processes:
        kill(each._process)
        join(each._process, 20)
        assert not each._process.is_alive()


def test_a_timed_process_is_known_though_a_signal_interrupts_its_start(monkeypatch):
    """So the clean-up can end it first."""
    fork = multiprocessing.get_context("fork").Process
    start = fork.start

    def interrupted(process):
        start(process)
        raise SystemExit

    monkeypatch.setattr(fork, "start", interrupted)
    with pytest.raises(SystemExit):
        TimedProcess(lambda _: time.sleep(600))
    (process,) = multiprocessing.active_children()
    end_all()
    assert not process.is_alive()


def test_the_process_that_writes_the_token_is_ended_before_the_token_is_removed(monkeypatch):
    did = []

    def signalled(*_):
        raise SystemExit(143)

    monkeypatch.setattr(coordinator, "_gather_nodes", signalled)
    monkeypatch.setattr(coordinator, "open_store", lambda _: SimpleNamespace(close=lambda: did.append("close")))
    monkeypatch.setattr(coordinator, "end_all", lambda: did.append("end"))
    monkeypatch.setattr(coordinator, "run_timed", lambda *_: did.append("remove"))
    with pytest.raises(SystemExit):
        coordinator.run_coordinator(parse(NEEDED), Node(rank=0, name="n", names=("n",)), None, None, None)
    assert did == ["end", "remove", "close"]


def test_a_second_signal_does_not_interrupt_the_clean_up():
    received = []
    with pytest.raises(SystemExit, match="143"):
        command._end(received, 15, None)
    command._end(received, 15, None)
    assert received == [15, 15]


@pytest.fixture
def clock_of_the_limit(monkeypatch):
    """A clock that the test sets, in seconds."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_imports_are_not_counted(clock_of_the_limit, monkeypatch):
    """They may take longer than all checks."""

    def import_slowly():
        clock_of_the_limit.seconds += 200.0

    def times(options, me, probes, limit, report):
        return [limit.elapsed, limit.seconds, limit.left(1.0)]

    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "import_all", import_slowly)
    monkeypatch.setattr(command, "run_coordinator", times)
    monkeypatch.setattr(time_limit.TimeLimit, "enforce", lambda self: None)
    assert command.main(NEEDED) == [0.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("names", "joined", "bad"), [("abc", {}, []), ("abc", {1: "b"}, ["c"]), ("ab", {}, ["b"]), ("ab", {1: "b"}, [])]
)
def test_no_node_is_blamed_if_none_of_several_joins_the_first_one(names, joined, bad):
    """The first node itself may be late."""
    state = coordinator.PreflightState(node=Node(rank=0, name="a", names=tuple(names)))
    store = SimpleNamespace(collect=lambda *_: joined)
    coordinator._gather_nodes(store, state, SimpleNamespace(rendezvous="a:1"), time_limit.TimeLimit(60.0, "a", ""))
    assert faulty_nodes(state.results, list(names)) == bad
    assert [result.ok for result in state.results] == [True, *(rank in joined for rank in range(1, len(names)))]


def test_a_node_that_imports_quickly_uses_the_time_of_the_first_node(clock_of_the_limit, monkeypatch):
    """Otherwise it would end before the first node stops waiting for its answer."""
    own, first = (time_limit.TimeLimit(60.0, node, "") for node in ("b", "a"))
    ends = []

    def join(rendezvous, deadline):
        clock_of_the_limit.seconds += 20.0
        first.restart(60.0)
        clock_of_the_limit.seconds += 1.0
        return SimpleNamespace(wait_for=lambda *_: "0", post=lambda *_: None, close=lambda: None)

    monkeypatch.setattr(worker, "join_store", join)
    monkeypatch.setattr(worker, "_take_part", lambda store, options, me, probes, limit: ends.append(limit.at(1.0)))
    me = Node(rank=1, name="b", names=("a", "b"))
    assert worker.run_worker(SimpleNamespace(rendezvous=None), me, None, own) == 0
    assert ends == [first.at(1.0) + 1.0]


ENFORCED = """
import time
from megatron_paint.launch.preflight.time_limit import TimeLimit
limit = TimeLimit(1.5, "n", "the start")
limit.enforce()
limit.restart(600.0)
time.sleep(2.0)
print("continues", flush=True)
limit.phase = "the end"
limit.restart(0.1)
time.sleep(600.0)
"""


def test_the_time_that_began_last_is_the_one_that_ends():
    done = subprocess.run([sys.executable, "-c", ENFORCED], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stdout) == (time_limit.BAD, "continues\n")
    assert done.stderr == "preflight: node n: time is up after 0.1 s, in the end\n"


@pytest.fixture
def taken():
    """A port at which something else listens, which never answers."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_the_first_node_reports_a_port_that_is_taken(taken):
    options = parse(["--run", "r", "--rendezvous", f"127.0.0.1:{taken}", "--settings", "s.yaml"])
    states = []
    me = Node(rank=0, name="a", names=("a", "b"))

    def report(state):
        states.append(state)
        return 3

    assert coordinator.run_coordinator(options, me, None, time_limit.TimeLimit(60.0, "a", ""), report) == 3
    (result,) = states[0].results
    assert (result.node, result.check, result.ok) == ("a", "rendezvous", False)
    assert result.seen.startswith(f"port {taken} is taken by process {os.getpid()} (")


def test_another_node_reports_a_listener_that_does_not_answer(taken, capsys, monkeypatch):
    """torch waits for the greeting of such a listener for ever (tests/reliability/test_preflight.py, long)."""
    monkeypatch.setattr(store, "_greet", lambda *_: time.sleep(5))
    options = parse(["--run", "r", "--rendezvous", f"127.0.0.1:{taken}", "--settings", "s.yaml"])
    me = Node(rank=1, name="b", names=("a", "b"))
    began = time.monotonic()
    assert worker.run_worker(options, me, None, time_limit.TimeLimit(2.5, "b", "")) == time_limit.BAD
    assert time.monotonic() - began < 60
    assert capsys.readouterr().err == (
        f"preflight: node b: rendezvous: the listener at 127.0.0.1:{taken} is not the preflight of the first node (it "
        "does not answer); read the first node's message\n"
    )


def test_a_node_has_time_to_answer_at_every_limit():
    """Between the deadline of a phase and the end of the first node's wait for the results, and at the end."""
    local, total = time_limit.LOCAL + time_limit.GRACE, time_limit.COLLECTIVE + time_limit.GRACE
    assert time_limit.JOIN < time_limit.LOCAL < local < time_limit.COLLECTIVE < total < time_limit.GOODBYE < 1.0
    assert time_limit.GRACE * LIMIT_SECONDS > timed_process.END_SECONDS


def test_a_timed_process_that_dies():
    outcome = run_timed(lambda: os.kill(os.getpid(), signal.SIGKILL), 20)
    assert (outcome.kind, outcome.problem) == ("killed", "its process died of SIGKILL")
