"""Scores a model against itself: a wrong offset, mask or weight would show as a loss above rounding."""

from megatron_paint.config import Settings
from megatron_paint.errors import UserError
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.objectives.losses import DistillationLoss
from megatron_paint.policy import Policy
from megatron_paint.problems import ProblemSet
from megatron_paint.prompts import Prompts
from megatron_paint.records import Problem, Sample
from megatron_paint.run.progress import Progress

PROBLEMS = 4  # ours: enough to see a wrong offset, too few to be noticed


def self_check(settings: Settings, policy: Policy, problems: ProblemSet, prompts: Prompts, progress: Progress) -> None:
    """Says the loss of the model against itself, in nats a token; UserError where it is above its limit."""
    loss = DistillationLoss(
        config=InterpolationLossConfig(positions="none", temperature=settings.objective.loss.temperature),
        chunk_bytes=settings.objective.chunk_bytes,
        token_temperature=1.0,
    )
    samples = [_own_sample(problem, settings, prompts) for problem in problems.batch(1)[:PROBLEMS]]
    try:
        scores = policy.evaluate_loss(samples, loss, teach_itself=True)
    except FloatingPointError as error:
        raise UserError(f"self-check: {error}. The weights of {settings.model.hf_path} are damaged") from error
    floor = sum(score.loss_sum for score in scores) / sum(score.num_tokens for score in scores)
    limit = settings.run.self_check_limit
    message = f"self-check: loss of the model against itself {floor:.2e} nats a token (limit {limit:g})"
    progress.note(message, nats_per_token=floor, limit=limit)
    if not floor <= limit:
        raise UserError(
            f"self-check: the model differs from itself by {floor:.3g} nats a token, above "
            f"run.self_check_limit={limit:g}; with FP8 try another megatron.fp8_recipe or raise the limit"
        )


def _own_sample(problem: Problem, settings: Settings, prompts: Prompts) -> Sample:
    """The solution as a response, with the student's prompt on both sides."""
    prompt = prompts.student_prompt(problem)
    return Sample(
        problem=problem,
        sample_index=0,
        key=0,
        student_prompt_ids=prompt,
        teacher_prompt_ids=prompt,
        response_ids=prompts.sft_response(problem)[: settings.rollout.max_new_tokens],
    )
