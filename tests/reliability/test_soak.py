"""One rank after another dies at any moment of a run, which goes on each time; 10 times here, 100 by `make soak`.

`tests/end_to_end/test_resume.py` has all ranks die in the midst of their writes.
"""

import os
import random

from megatron_paint.run.folder import RunFolder
from megatron_paint.run.heartbeat import read_beats
from tests.end_to_end import ranks
from tests.end_to_end.conftest import trained  # noqa: F401
from tests.end_to_end.test_resume import check_whole, metrics, same, weights

KILLS = int(os.environ.get("MEGATRON_PAINT_KILLS", "10"))
STEPS_A_KILL = 1.0  # steps that a life adds, about
MOST_BEATS = 60  # two steps, about


def test_ranks_killed_at_any_moment(trained, tmp_path):  # noqa: F811
    """No step before the newest checkpoint is done again, nothing is damaged, and the end is the unbroken run's."""
    steps = 4 + round(STEPS_A_KILL * KILLS)
    arguments = ("evaluation.problems=null", f"run.steps={steps}", "run.save_every=1", "run.keep_last=2")
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    assert ranks.train(tmp_path, trained.settings, f"run.dir={unbroken}", *arguments).statuses == [0, 0]
    draw, phases, finished = random.Random(3), set(), False
    for _ in range(KILLS):
        rank, number = (
            draw.randrange(2),
            draw.randrange(1, MOST_BEATS) if draw.random() < 0.9 else -draw.randrange(1, 5),
        )
        before = RunFolder(run).latest_checkpoint() or 0
        command = ("train", trained.settings, f"run.dir={run}", "run.resume=auto", *arguments, "--json")
        target = "tests.reliability.spoilt:killed"
        ended = ranks.run(tmp_path, *command, f"{rank}:{number}", target=target)
        finished = ended.statuses == [0, 0]
        if finished:
            break
        assert ended.statuses[rank] == -9, ended
        check_whole(run)
        folder = RunFolder(run)
        newest, done = folder.latest_checkpoint() or 0, [line["step"] for line in folder.read_metrics()]
        assert newest >= before
        assert done == list(range(1, len(done) + 1))
        assert newest <= len(done) <= newest + 1
        phases |= {beat.phase for beat in read_beats(run / "logs" / "heartbeats") if beat.rank == rank}
    print(f"killed up to step {len(done)} of {steps}, in phases {sorted(phases)}")
    assert finished or len(phases) >= 3
    ended = ranks.train(tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto", *arguments)
    assert ended.statuses == [0, 0], ended
    assert same(weights(run, steps), weights(unbroken, steps))
    assert metrics(run) == metrics(unbroken)
    assert RunFolder(run).checkpoints() == RunFolder(unbroken).checkpoints() == [steps - 1, steps]
    for step in range(1, steps + 1):
        samples = [place / "samples" / f"step_{step:06d}.jsonl" for place in (run, unbroken)]
        assert samples[0].read_bytes() == samples[1].read_bytes()
