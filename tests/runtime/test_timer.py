"""The seconds of the phases of a step, on a clock that the test moves."""

from megatron_paint.runtime.timer import Timer


def test_seconds_add_up_by_phase():
    now = [0.0]
    timer = Timer(lambda: now[0])
    for phase, seconds in (("mask", 2.0), ("teacher", 1.0), ("mask", 0.5)):
        with timer(phase):
            now[0] += seconds
        now[0] += 10.0  # outside
    assert timer.seconds == {"mask": 2.5, "teacher": 1.0}
