"""What the parts of a run are expected to take."""

from megatron_paint.runtime.pace import Pace


def test_parts_are_expected_to_take_what_they_took_the_last_time():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    assert pace.expected(["step", "evaluation"]) == 0.0
    for seconds in (9.0, 4.0):
        with pace.timed("step"):
            now[0] += seconds
    with pace.timed("evaluation"):
        now[0] += 100.0
    assert pace.expected(["step"]) == 4.0
    assert pace.expected(["checkpoint", "evaluation"]) == 100.0


def test_what_goes_on_behind_counts_with_what_is_left_of_it():
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    pace.begin("write")
    now[0] = 20.0
    assert pace.expected([]) == 0.0, "the first of its kind"
    pace.end("write")
    assert pace.expected([]) == 0.0, "nothing is running"
    pace.begin("write")
    now[0] = 25.0
    assert pace.expected([]) == 15.0
    now[0] = 90.0
    assert pace.expected([]) == 0.0, "longer than expected"
