"""GRPO by hand-worked numbers: advantages, the clipped ratio and its gradient, which groups are trained on."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.objective import GrpoSettings
from megatron_paint.grading.grade import Grade, Rules
from megatron_paint.grading.graders import Graders
from megatron_paint.losses import WholeVocab
from megatron_paint.losses.interface import ResponseRows
from megatron_paint.losses.objectives import PolicyGradientLoss
from megatron_paint.objectives import Grpo, ObjectiveInputs
from megatron_paint.objectives.grpo import advantages
from megatron_paint.objectives.metrics import metrics_of, sample_lines
from megatron_paint.records import Problem, Rollout, Sample, SampleScore, StepReport, UpdateReport
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.runtime.rank_zero import directly
from megatron_paint.runtime.timer import Timer

PROBLEM = Problem(id="a", problem="", solution="", answer="7")


def test_advantages():
    """(1, 0, 0, 0): mean 1/4; squared deviations 9/16 + 3/16 over 3 give 1/4, so the deviation is 1/2."""
    assert advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([0.75 / 0.500001] + [-0.25 / 0.500001] * 3, rel=1e-12)
    assert advantages([1.0, 0.0]) == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6)])
    assert advantages([1.0] * 3) == advantages([0.0] * 3) == [0.0] * 3


def loss_of(*, p, old=None, sampler=0.5, advantage=1.0, weight=1.0, reference=None, **settings):
    """(loss, gradient with respect to log p, clipped) of one token that has probability p of two."""
    logit = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64, requires_grad=True)
    sample = Sample(
        problem=PROBLEM,
        key=0,
        advantage=advantage,
        weight=weight,
        old_logprobs=None if old is None else (math.log(old),),
        rollout=Rollout(
            problem_id="a", prompt_ids=(1,), response_ids=(0,), logprobs=(math.log(sampler),), finished=True
        ),
    )
    loss = PolicyGradientLoss(settings=GrpoSettings(**settings), chunk_bytes=1e6, temperature=1.0, kernel="torch")
    teacher = None
    if reference is not None:
        teacher = torch.tensor([[math.log(reference / (1 - reference)), 0.0]], dtype=torch.float64)
    output = loss(
        ResponseRows(
            samples=(sample,),
            lengths=(1,),
            token_ids_N=torch.tensor([0]),
            student_hidden_NH=logit,
            output_weight_VH=torch.eye(2, dtype=torch.float64),
            vocab=WholeVocab(),
            teacher_hidden_NH=teacher,
        )
    )
    output.loss_T.sum().backward()
    # d log p / d (first logit) = 1 - p
    return output.loss_T.item(), float(logit.grad[0, 0]) / (1 - p), int(output.sums["clipped_ratios"])


@pytest.mark.parametrize(
    ("given", "loss", "gradient", "clipped"),
    [
        ({"p": 0.5}, -1.0, -1.0, 0),  # the first update: a ratio of 1, whose gradient is the advantage
        ({"p": 0.5, "advantage": -2.0}, 2.0, 2.0, 0),
        ({"p": 0.5, "old": 0.4}, -1.2, 0.0, 1),  # 1.25 is cut to 1.2
        ({"p": 0.5, "old": 0.4, "clip_high": 0.28}, -1.25, -1.25, 0),  # the asymmetric bound lets it through
        ({"p": 0.5, "old": 0.4, "advantage": -1.0}, 1.25, 1.25, 0),  # a bad token may always be made less likely
        ({"p": 0.5, "old": 0.8}, -0.625, -0.625, 0),  # and a good one more likely
        ({"p": 0.5, "old": 0.8, "advantage": -1.0}, 0.8, 0.0, 1),
        ({"p": 0.5, "sampler": 0.4}, -1.25, -1.25, 0),  # importance weight 0.5 / 0.4
        ({"p": 0.5, "sampler": 0.1}, -2.0, -2.0, 0),  # 5, cut to 2
        ({"p": 0.5, "sampler": 0.1, "importance_limit": None}, -1.0, -1.0, 0),
        ({"p": 0.5, "old": 0.8, "sampler": 0.5}, -0.625 * 1.6, -0.625 * 1.6, 0),  # of the old probability
        ({"p": 0.5, "weight": 3.0}, -3.0, -3.0, 0),
        # k3 of 0.25 / 0.5: 0.5 - log 0.5 - 1, and its gradient 1 - 0.5
        ({"p": 0.5, "reference": 0.25, "kl_weight": 0.1}, -1.0 + 0.1 * (math.log(2) - 0.5), -1.0 + 0.1 * 0.5, 0),
        ({"p": 0.5, "advantage": 0.0}, 0.0, 0.0, 0),
    ],
)
def test_the_loss_of_a_token(given, loss, gradient, clipped):
    if "old" in given and "sampler" not in given:
        given = given | {"sampler": given["old"]}
    assert loss_of(**given) == pytest.approx((loss, gradient, clipped), rel=1e-12, abs=1e-12)


def test_a_group_whose_rewards_are_equal_has_a_gradient_of_exactly_0():
    (advantage, *_) = advantages([1.0] * 8)
    assert loss_of(p=0.3, sampler=0.3, advantage=advantage)[1] == 0.0


class Taught:
    """A policy that samples what it is told and notes what it is trained on; one update may not be finite."""

    def __init__(self, lengths, not_finite_in=None):
        self.lengths = lengths
        self.not_finite_in = not_finite_in
        self.updates = []

    def generate(self, requests, sampling):
        return [
            Rollout(
                problem_id=request.problem_id,
                sample_index=request.sample_index,
                prompt_ids=request.prompt_ids,
                response_ids=(5,) * length,
                logprobs=(-1.0,) * length,
                finished=True,
            )
            for request, length in zip(requests, self.lengths, strict=True)
        ]

    def sync_weights(self, step):
        self.synced = step

    def release_memory(self):
        pass

    def update(self, samples, loss, *, lr):
        self.updates.append(samples)
        if len(self.updates) == self.not_finite_in:
            raise FloatingPointError("the gradient's norm is nan")
        scores = tuple(
            SampleScore(
                loss_sum=1.0,
                num_tokens=len(sample.response_ids),
                loss_tokens=len(sample.response_ids),
                token_logprobs=(-2.0,) * len(sample.response_ids),
                sums={
                    "clipped_ratios": len(self.updates) - 1,
                    "student_entropy": 0.5 * len(sample.response_ids),
                    **({"divergence_other": 0.25 * len(sample.response_ids)} if loss.needs_teacher else {}),
                },
            )
            for sample in samples
        )
        return UpdateReport(scores=scores, grad_norm=float(len(self.updates)), seconds={"student": 1.0})


def step(rewards, *, lengths, not_finite_in=None, **grpo):
    """(result, metrics, policy) of a step of one group after another of two."""
    settings = settings_of(
        {
            "model": {"hf_path": "m"},
            "data": {"train": "p.jsonl"},
            "run": {"dir": "r"},
            "objective": {"name": "grpo", "grpo": {"samples_per_problem": 2, **grpo}},
        }
    )
    prompts = SimpleNamespace(
        tokenizer=SimpleNamespace(stop_ids=(3,)), student_prompt=lambda problem: (1,), response_text=lambda ids: ""
    )
    verdicts = [Grade(correct=bool(r), extracted="", outcome="right" if r else "timeout") for r in rewards]
    graders = SimpleNamespace(grade=lambda pairs: verdicts)
    problems = [Problem(id=str(i), problem="", solution="", answer="") for i in range(len(rewards) // 2)]
    policy = Taught(lengths, not_finite_in)
    source = RolloutSource(policy, prompts, settings.rollout, samples=2, seed=settings.run.seed)
    objective = Grpo(ObjectiveInputs(settings=settings.objective, prompts=prompts, rollouts=source, graders=graders))
    timer = Timer()
    result = objective.step(policy, problems, step=3, lr=1e-3, timer=timer)
    return result, metrics_of(result, step=3, lr=1e-3, seconds=timer.seconds), policy


@pytest.mark.parametrize(("policy", "outcomes"), [("ignore", ["no_answer", "right"]), ("count", ["right", "right"])])
def test_a_box_in_an_unfinished_thought_follows_the_policy(policy, outcomes):
    """The prompt opens the thought. The first response is cut inside it."""
    texts = {(1,): "assistant\n<think>\n", (2,): "Perhaps \\boxed{4}, but", (3,): "a</think> \\boxed{4}"}
    with Graders(workers=1, rules=Rules(box_in_thought=policy)) as graders:
        grpo = SimpleNamespace(
            prompts=SimpleNamespace(response_text=texts.__getitem__), graders=graders, on_rank_zero=directly
        )
        rollouts = [Rollout(problem_id="0", prompt_ids=(1,), response_ids=ids) for ids in ((2,), (3,))]
        grades = Grpo.grades(grpo, [Problem(id="0", problem="", solution="", answer="4")], rollouts)
    assert [grade.outcome for grade in grades] == outcomes
    assert Grpo.extras(grpo, grades, [0], [])["reward/box_in_thought"] == 1


def test_only_groups_that_differ_are_trained_on():
    report, metrics, policy = step([1, 1, 1, 0, 0, 0], lengths=[4, 2, 3, 1, 2, 2], updates_per_batch=2)
    first, second = policy.updates
    assert [sample.problem.id for sample in first] == ["1", "1"]
    assert [sample.advantage > 0 for sample in first] == [True, False]
    # The advantage does not tell a right group from a wrong one, so each sample has its verdict.
    assert [sample.correct for sample in report.samples] == [True, True, True, False, False, False]
    recorded = sample_lines(
        StepReport(step=3, metrics=metrics, samples=report.samples, scores=report.scores), decode=str
    )
    assert [line["reward"] for line in recorded] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [sample.old_logprobs for sample in first] == [None, None]
    assert [sample.old_logprobs for sample in second] == [(-2.0,) * 3, (-2.0,)]
    assert [len({sample.key for sample in part}) for part in (first, report.samples)] == [2, 6]
    assert [score.loss_tokens for score in report.scores] == [0, 0, 3, 1, 0, 0]
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/equal_groups_share"] == pytest.approx(2 / 3)
    assert metrics["reward/timeouts"] == 3
    assert metrics["updates"] == 2
    assert metrics["grad_norm"] == 1.5
    assert metrics["ratio/clipped_share"] == 2 / 8  # one token of each sample in the second update
    assert metrics["num_tokens"] == 14
    assert metrics["entropy/student_mean"] == 0.5  # of the tokens that were scored
    assert math.isnan(metrics["entropy/teacher_mean"])
    assert math.isnan(metrics["kl/mean"])
    assert math.isnan(metrics["divergence/other_mean"])
    assert metrics["loss_tokens"] == 4
    assert metrics["time/student_s"] == 2.0
    assert all(score.token_logprobs is None for score in report.scores)


def test_the_kl_is_that_of_what_was_scored():
    _, metrics, policy = step([1, 0, 0, 0], lengths=[4, 2, 3, 1], kl_weight=0.1)
    assert all(sample.teacher_prompt_ids == sample.student_prompt_ids for sample in policy.updates[0])
    assert metrics["kl/mean"] == metrics["divergence/other_mean"] == 0.25


def test_no_step_is_taken_where_no_group_differs():
    _, metrics, policy = step([1, 1, 0, 0], lengths=[1, 2, 3, 4])
    assert policy.updates == []
    assert metrics["reward/equal_groups_share"] == 1.0
    assert metrics["updates"] == metrics["loss"] == 0.0
    assert math.isnan(metrics["grad_norm"])


def test_an_update_that_is_not_finite_ends_the_updates():
    """The step stands with the updates before it, and says so; without any it is none."""
    given = {"lengths": [3, 1], "updates_per_batch": 4}
    complete, all_metrics, _ = step([1, 0], **given)
    report, metrics, policy = step([1, 0], not_finite_in=3, **given)
    assert len(policy.updates) == 3
    assert (all_metrics["updates"], metrics["updates"]) == (4, 2)
    assert (all_metrics["grad_norm"], metrics["grad_norm"]) == (2.5, 1.5)  # norms of 1, 2, 3 and 4
    assert complete.warnings == ()
    assert report.warnings == ("step 3 ended after 2 of 4 updates: the gradient's norm is nan",)
    assert (report.samples, report.scores) == (complete.samples, complete.scores)
    with pytest.raises(FloatingPointError, match="norm is nan"):
        step([1, 0], not_finite_in=1, **given)


def test_a_mean_over_responses():
    """Divided by the 4 tokens that are trained on, the weights make of a sum the mean of the two responses' means."""
    _, _, policy = step([1, 1, 1, 0], lengths=[9, 9, 3, 1], normalisation="sequence_mean")
    assert [sample.weight for sample in policy.updates[0]] == [4 / (2 * 3), 4 / (2 * 1)]
    _, _, policy = step([1, 1, 1, 0], lengths=[9, 9, 3, 1])
    assert [sample.weight for sample in policy.updates[0]] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout": {"temperature": 0}}, "rollout.temperature=0"),
        ({"rollout": {"engine": "replay", "path": "r.jsonl"}}, "importance_limit=2.0 .* set it to null"),
        ({"objective": {"name": "grpo", "grpo": {"samples_per_problem": 1}}}, "samples_per_problem .*got 1"),
        ({"objective": {"name": "grpo", "grpo": {"clip_low": 1.0}}}, "clip_low"),
        (
            {"objective": {"name": "grpo", "grpo": {"kl_weight": 0.1}, "teacher": {"weights": "current"}}},
            "kl_weight=0.1 .* set it to initial or ema",
        ),
        ({"objective": {"name": "grpo", "grpo": {"beta": 0.1}}}, "unknown setting objective.grpo.beta"),
    ],
)
def test_settings_that_cannot_work(changes, says):
    tree = {"model": {"hf_path": "m"}, "data": {"train": "p"}, "run": {"dir": "r"}, "objective": {"name": "grpo"}}
    with pytest.raises(UserError, match=says):
        settings_of(tree | changes)
