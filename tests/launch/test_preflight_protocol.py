"""The preflight over several nodes on a simulated clock: who is blamed, what every node returns, and when it ends."""

import pytest

from megatron_paint.launch.preflight import time_limit
from tests.launch.simulated_nodes import CHECK_SECONDS, Fault, simulate

SUM = "all-reduce over all nodes"
GOOD = Fault()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs simulated nodes; the names that are written for --exclude are in `excluded`."""

    def preflight(*faults, limit=60, options=()):
        ended = simulate(monkeypatch, tmp_path, *faults, limit=limit, options=options)
        ended.excluded = (tmp_path / "bad").read_text().split()
        return ended

    return preflight


def test_all_nodes_pass_without_waiting_for_a_deadline(run, capsys):
    ended = run(GOOD, GOOD, GOOD)
    assert ended.status == {"n0": 0, "n1": 0, "n2": 0}
    assert ended.reported_at == 2 * CHECK_SECONDS
    assert capsys.readouterr().out.splitlines() == [
        "preflight: all-reduce over the nodes: 3 GB/s (no floor)",
        "preflight: 3 nodes ok in 4.0 s",
    ]


def test_a_node_that_never_starts(run, capsys):
    ended = run(GOOD, GOOD, Fault(absent=True))
    assert ended.status == {"n0": 3, "n1": 3}
    assert ended.failed() == {("n2", "join")}
    assert "preflight: node n2: join: did not join within 24 s; check that it was started" in capsys.readouterr().out
    assert ended.excluded == ["n2"]
    assert ended.reported_at == 24 + 2 * CHECK_SECONDS


def test_a_node_that_joins_too_late(run):
    """It takes no part, and ends with the status of the others."""
    ended = run(GOOD, GOOD, Fault(delays={"join/2": 25.0}))
    assert ended.status == {"n0": 3, "n1": 3, "n2": 3}
    assert ended.failed() == {("n2", "join")}


def test_a_node_that_stops_in_its_checks(run):
    ended = run(GOOD, Fault(stops_in="checks"), GOOD)
    assert ended.status == {"n0": 3, "n2": 3}
    assert ended.failed() == {("n1", "answers")}
    assert ended.excluded == ["n1"]
    assert ended.reported_at == pytest.approx(60 * (time_limit.LOCAL + time_limit.GRACE) + CHECK_SECONDS)


@pytest.mark.parametrize(("late", "bad"), [(0.0, ["n2"]), (1.5, ["n2"]), (7.0, ["n2"]), (7.5, ["n1", "n2"])])
def test_a_node_that_stops_in_the_sum_is_blamed_and_the_nodes_that_wait_are_not(run, late, bad):
    """Even if one of them answers late, as long as it answers within the grace time: 6 % of the limit, 7.2 s."""
    ended = run(GOOD, Fault(delays={"sum/1": late}), Fault(stops_in="sum"), limit=120)
    assert ended.status == {"n0": 3, "n1": 3}
    assert ended.failed() == {(node, "answers") for node in bad}
    assert {result.seen for result in ended.results if not result.ok} == {f"stopped answering in the {SUM}"}
    assert ended.excluded == bad
    assert ended.reported_at == pytest.approx(120 * (time_limit.COLLECTIVE + time_limit.GRACE))


@pytest.mark.parametrize(("late", "status"), [(5.0, 0), (9.5, 0), (10.5, 3)])
def test_the_first_node_waits_until_the_others_have_read_the_status(run, capsys, late, status):
    """At most 10 s: then it closes the store."""
    ended = run(GOOD, Fault(delays={"status": late}), GOOD)
    assert ended.status == {"n0": 0, "n1": status, "n2": 0}
    lost = "preflight: node n1: n0, the first node, stopped answering (the store is closed; this node was in the wait"
    assert capsys.readouterr().err.startswith(lost) == (status != 0)


def test_the_first_node_stops(run, tmp_path, capsys):
    """The other one ends when the time of the first node is up."""
    (tmp_path / "bad").touch()
    ended = run(Fault(stops_in="sum"), GOOD)
    assert ended.status == {"n1": 3}
    assert ended.ended_at == {"n1": 60.0}
    assert capsys.readouterr().err == (
        "preflight: node n1: n0, the first node, stopped answering (status was not posted in time; this node was in "
        "the wait for the status of n0); read the message of the first node, or have it repaired\n"
    )


def test_a_floor_under_the_bandwidth(run, capsys):
    ended = run(GOOD, GOOD, options=("--bandwidth-floor=3.5",))
    assert set(ended.status.values()) == {3}
    assert ended.failed() == {("n0", SUM), ("n1", SUM)}
    assert ended.excluded == []  # no node is slower than the others
    assert "preflight: nodes n0, n1: all-reduce over all nodes: 3 GB/s, below the floor" in capsys.readouterr().out
    assert set(run(GOOD, GOOD, options=("--bandwidth-floor=3",)).status.values()) == {0}
