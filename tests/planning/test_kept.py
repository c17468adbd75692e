"""The plan with several responses a problem: what is sampled and trained on, and a teacher that sees a response."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.planning.stage_memory import StageMemory
from tests.planning.test_memory import plan_of

PEERS = ("objective.reveal.solution=peer_rollout", "rollout.samples_per_problem=4")


def parts_of(tmp_path, *changes):
    """(parts of all peaks by moment, lines) of Qwen3-8B at TP 2 x DP 4: 32 problems, so 8 on each replica."""
    plan = plan_of(tmp_path, *changes)
    stage = StageMemory(plan.settings, plan, stage=0, engine=True, triton=True, on_gpus=False)
    peaks = {peak.moment: peak.parts for peak in (*stage.training(), *stage.sampling())}
    return peaks, plan.lines(plan.settings)


@pytest.mark.parametrize(
    ("changes", "sampled", "trained"),
    [
        ((), 8, 8),
        (("rollout.samples_per_problem=4",), 32, 32),
        (("rollout.samples_per_problem=4", "rollout.keep=correct"), 32, 32),  # all may be right
        (("rollout.samples_per_problem=4", "rollout.keep=shortest_correct"), 32, 8),
    ],
)
def test_responses_of_a_replica(tmp_path, changes, sampled, trained):
    """The teacher leaves 4,096 numbers of 2 bytes for each of 1,024 tokens of what is trained on. A row that is sampled
    has 1,024 keys and values of 8 heads of 128 in 36 layers, half of them on a rank, beside 16,384 tokens of prompts.
    """
    peaks, lines = parts_of(tmp_path, *changes)
    assert peaks["backward pass"]["teacher's results"] == trained * 1024 * 4096 * 2
    assert peaks["rollouts"]["key-value cache"] == 36 * 2 * 1024 * 2 / 2 * (sampled * 1024 + 16384)
    (line,) = [line for line in lines if line.startswith("step ")]
    assert line.split(": ")[0].startswith(
        f"step       32 problems{' with 4 responses each' if changes else ''}, about 8 a replica, micro-batches of at"
    )


def test_ranks_sample_nothing_where_servers_do(tmp_path):
    peaks, _ = parts_of(tmp_path, "evaluation.problems=held_out.jsonl")
    assert {"rollouts", "evaluation"} <= peaks.keys()
    by_servers, _ = parts_of(
        tmp_path, "evaluation.problems=held_out.jsonl", "rollout.engine=vllm", "rollout.cache_bytes=1"
    )
    assert not {"rollouts", "evaluation"} & by_servers.keys()


@pytest.mark.parametrize("new_tokens", [1024, 8192, 12000, 20000, 30000])
def test_a_teacher_that_sees_a_response_has_longer_sequences(tmp_path, new_tokens):
    """A response and one before it are a micro-batch alone if they exceed 16,384 tokens, up to all positions."""
    given = f"rollout.max_new_tokens={new_tokens}"
    (own, _), (peers, _) = (parts_of(tmp_path, given, *more) for more in (("rollout.samples_per_problem=4",), PEERS))
    tokens = max(16384, new_tokens)
    longest = min(max(tokens, 2 * new_tokens), 40960)
    ratio = peers["teacher's pass"]["working memory"] / own["teacher's pass"]["working memory"]
    assert ratio == pytest.approx(longest / tokens)
    del own["teacher's pass"], peers["teacher's pass"]
    assert own == peers  # the student never sees a response in its prompt


def test_ranks_that_sample_nothing_need_no_cache(tmp_path):
    """Supervised fine-tuning, and rollouts from a file; an evaluation of either samples with the ranks."""
    for changes in (("objective.name=sft",), ("rollout.engine=replay", "rollout.path=rollouts.jsonl")):
        peaks, _ = parts_of(tmp_path, *changes, "rollout.cache_bytes=1")
        assert not {"rollouts", "evaluation"} & peaks.keys()
        with pytest.raises(UserError, match=r"rollout\.cache_bytes=1 is less than the keys and values of one response"):
            parts_of(tmp_path, *changes, "rollout.cache_bytes=1", "evaluation.problems=held_out.jsonl")
    with pytest.raises(UserError, match=r"rollout\.cache_bytes=1 is less"):
        parts_of(tmp_path, "rollout.cache_bytes=1")
