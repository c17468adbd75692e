"""--slow-limit: a test that is too slow and not marked long fails the session."""

from types import SimpleNamespace

import pytest

from tests.conftest import SlowTests


def session_of(*durations, limit, keywords=()):
    """Exit status and printed lines of a session with one test, whose phases take so many seconds."""
    plugin = SlowTests(SimpleNamespace(getoption=lambda _: limit))
    for duration in durations:
        plugin.pytest_runtest_logreport(SimpleNamespace(nodeid="a", duration=duration, keywords=keywords))
    session, lines = SimpleNamespace(exitstatus=pytest.ExitCode.OK), []
    plugin.pytest_sessionfinish(session)
    plugin.pytest_terminal_summary(SimpleNamespace(section=lambda title, **_: lines.append(title), line=lines.append))
    return session.exitstatus, lines


def test_a_slow_test_with_its_fixtures():
    status, lines = session_of(40.0, 25.0, 0.5, limit=60.0)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert lines == ["slower than 60 s and not marked long", "a: 66 s"]


@pytest.mark.parametrize(
    ("durations", "limit", "keywords"),
    [((40.0, 19.0), 60.0, ()), ((40.0, 25.0), None, ()), ((40.0, 25.0), 60.0, ("long",))],
    ids=["not slow", "no limit", "long"],
)
def test_what_passes(durations, limit, keywords):
    assert session_of(*durations, limit=limit, keywords=keywords) == (pytest.ExitCode.OK, [])
