"""How far long work is."""

import threading

import pytest

from megatron_paint.runtime.work import Work, work, work_now


def test_rate_and_time_left():
    times = iter([100.0, 104.0, 104.0, 104.0, 104.0])
    found = Work("sampling", total=1000, unit="tokens", clock=lambda: next(times))
    found.advance(150)
    found.advance(50)
    assert found.rate == 50.0
    assert found.seconds_left == 16.0


def test_unknown_total_and_no_progress():
    times = iter([0.0, 2.0, 2.0])
    assert Work("a", total=0, unit="rows", clock=lambda: next(times)).seconds_left is None
    still = iter([0.0, 2.0, 2.0])
    assert Work("a", total=5, unit="rows", clock=lambda: next(still)).seconds_left is None


def test_the_innermost_work_is_shown_and_what_is_in_the_background_last():
    assert work_now() is None
    with work("step", total=2, unit="parts") as outer:
        with work("saving", total=9, unit="bytes", in_background=True) as saving:
            assert work_now() is outer
            with work("sampling", total=5, unit="tokens") as inner:
                assert work_now() is inner
            assert work_now() is outer
        assert work_now() is outer
    with work("saving", total=9, unit="bytes", in_background=True) as saving:
        assert work_now() is saving
    assert work_now() is None


def test_an_error_ends_the_work():
    with pytest.raises(ValueError, match="x"), work("a", total=1, unit="rows"):
        raise ValueError("x")
    assert work_now() is None


def test_another_thread_sees_it():
    seen = []
    with work("a", total=4, unit="rows") as begun:
        begun.advance(3)
        thread = threading.Thread(target=lambda: seen.append(work_now().done))
        thread.start()
        thread.join()
    assert seen == [3]
