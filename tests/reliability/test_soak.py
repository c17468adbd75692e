"""One rank after another dies at any moment of a run, which resumes each time.

3 kills in `make test`, 10 in `make test-all`, 100 in `make soak`.

In the midst of a rollout, a teacher's or student's pass, the optimiser's step, a copy, a write, a flush, a rename or a
removal. `tests/end_to_end/test_resume.py` has all ranks die together in the midst of their writes.
"""

import os
from collections import Counter
from random import Random

import pytest

from megatron_paint.run.folder import RunFolder
from tests.support import forked_ranks
from tests.support.exports import same, weights_of_step
from tests.support.results import check_complete, metrics

KILLS = os.environ.get("MEGATRON_PAINT_KILLS")
STEPS_A_KILL = 1.0  # steps that a start adds, about
# Where a rank dies and up to at which time of coming there after a start; what rank 0 alone does is below.
WHERE = {"start": 8, "rollout": 40, "teacher": 4, "student": 4, "optimizer": 2, "checkpoint": 2}
WHERE |= {"copy": 2, "write": 2, "checksum": 2}
FIRST_RANK = {"metadata": 2, "flush": 40, "rename": 6, "finish": 2, "remove": 2, "record": 2}


def draw(random: Random) -> tuple[int, str, int]:
    """A rank, a place and the how-many-th time there."""
    where, most = random.choice([*WHERE.items(), *FIRST_RANK.items()])
    return 0 if where in FIRST_RANK else random.randrange(2), where, random.randint(1, most)


def numbers_of_kills() -> list:
    """3 in `make test`, 10 in `make test-all`, or what MEGATRON_PAINT_KILLS asks for."""
    if KILLS is None:
        return [3, pytest.param(10, marks=[pytest.mark.long, pytest.mark.timeout(1500)])]
    return [pytest.param(int(KILLS), marks=[pytest.mark.long, pytest.mark.timeout(600 + 90 * int(KILLS))])]


@pytest.mark.parametrize("kills", numbers_of_kills())
def test_ranks_killed_at_any_moment(kills, trained, tmp_path):
    """No step before the newest checkpoint is done again, nothing is damaged, and the end is the unbroken run's."""
    steps = 4 + round(STEPS_A_KILL * kills)
    arguments = ("evaluation.problems=null", f"run.steps={steps}", "run.save_every=1", "run.keep_last=2")
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    limit = 400.0 + 10.0 * steps
    ended = forked_ranks.train(tmp_path, trained.settings, f"run.dir={unbroken}", *arguments, limit=limit)
    assert ended.statuses == [0, 0], ended
    random, places, folder = Random(3), Counter(), RunFolder(run)
    while sum(places.values()) < kills:
        rank, where, number = draw(random)
        before = folder.latest_checkpoint() or 0
        command = ("train", trained.settings, f"run.dir={run}", "run.resume=auto", *arguments, "--json")
        target = "tests.reliability.spoilt:killed"
        ended = forked_ranks.run(tmp_path, *command, f"{rank}:{where}:{number}", target=target, limit=limit)
        if ended.statuses == [0, 0]:
            break  # it came to its end before it came there
        assert ended.statuses[rank] == -9, ended
        places[where] += 1
        check_complete(run)
        newest, done = folder.latest_checkpoint() or 0, [line["step"] for line in folder.read_metrics()]
        assert newest >= before
        assert done == list(range(1, len(done) + 1))
        assert newest <= len(done) <= newest + 2  # a step is done while the checkpoint of the one before is written
    print(f"killed {sum(places.values())} times up to step {folder.latest_checkpoint()} of {steps}: {dict(places)}")
    assert len(places) > min(kills, len(WHERE | FIRST_RANK)) / 2
    ended = forked_ranks.train(tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto", *arguments, limit=limit)
    assert ended.statuses == [0, 0], ended
    assert same(weights_of_step(run, steps), weights_of_step(unbroken, steps))
    assert metrics(run) == metrics(unbroken)
    assert folder.checkpoints() == RunFolder(unbroken).checkpoints() == [steps - 1, steps]
    for step in range(1, steps + 1):
        samples = [place / "samples" / f"step_{step:06d}.jsonl" for place in (run, unbroken)]
        assert samples[0].read_bytes() == samples[1].read_bytes()
