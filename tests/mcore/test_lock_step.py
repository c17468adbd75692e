"""The lock-step of replicas that share experts: both run as many calls as the one with more work, in rounds."""

import json

from megatron_paint.mcore.lock_step import LockStep
from tests.mcore.lock_step_worker import EVERY, WORK
from tests.support import forked_ranks


def test_replicas_run_the_same_number_of_calls(tmp_path):
    ended = forked_ranks.run(tmp_path, tmp_path, target="tests.mcore.lock_step_worker:main", processes=2, limit=100)
    assert ended.statuses == [0, 0], ended
    ours, theirs = (json.loads((tmp_path / f"calls{rank}.json").read_text()) for rank in (0, 1))
    assert ours == theirs
    assert ours == [[-(-max(work) // every) * every for work in WORK] for every in EVERY]


def test_a_replica_that_shares_no_experts_asks_nobody():
    step = LockStep(None, every=4)
    step.begin_call()
    assert not step.others_work()
