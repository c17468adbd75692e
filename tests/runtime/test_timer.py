"""The seconds of the phases of a step, on a clock that the test moves."""

import pytest

from megatron_paint.runtime.timer import Timer, observe_phases


def test_seconds_add_up_by_phase():
    now = [0.0]
    timer = Timer(lambda: now[0])
    for phase, seconds in (("mask", 2.0), ("teacher", 1.0), ("mask", 0.5)):
        with timer(phase):
            now[0] += seconds
        now[0] += 10.0  # outside
    assert timer.seconds == {"mask": 2.5, "teacher": 1.0}


class Notes(list):
    """An observer that notes what it is told."""

    def begin(self, phase):
        self.append(("begin", phase))
        return phase

    def end(self, begun, started, ended):
        self.append(("end", begun, started, ended))


def test_an_observer_gets_the_times_that_are_added_up():
    now, notes = [1.0], Notes()
    timer = Timer(lambda: now[0])
    observe_phases(notes)
    try:
        with timer("step"), timer("mask"):
            now[0] = 3.0
        with pytest.raises(FloatingPointError), timer("student"):
            raise FloatingPointError
    finally:
        observe_phases(None)
    with timer("mask"):
        now[0] = 7.0
    assert notes == [
        *[("begin", "step"), ("begin", "mask"), ("end", "mask", 1.0, 3.0), ("end", "step", 1.0, 3.0)],
        *[("begin", "student"), ("end", "student", 3.0, None)],
    ]
    assert timer.seconds == {"step": 2.0, "mask": 6.0}
