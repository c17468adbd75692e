"""Scores the model against itself before a run: the loss that is left when there is nothing to learn."""

from typing import TYPE_CHECKING

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.base.keys import derive_key
from megatron_paint.config.settings import Settings
from megatron_paint.data.problems import ProblemSet
from megatron_paint.data.prompts import Prompts
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.objectives import CrossEntropyLoss, DistillationLoss
from megatron_paint.policy import Policy
from megatron_paint.records import Problem, Rollout, Sample
from megatron_paint.rollouts.engine import GenerationRequest, Sampler, SamplingParameters
from megatron_paint.run.console import Progress

if TYPE_CHECKING:
    from megatron_paint.mcore.policy import MegatronPolicy

PROBLEMS = 4  # ours: enough to see a wrong offset, too few to be noticed
TOKENS = 16  # sampled of each


def self_check(
    settings: Settings, policy: Policy, sampler: Sampler, problems: ProblemSet, prompts: Prompts, progress: Progress
) -> list[Sample]:
    """Computes the same numbers in two ways and prints the differences.

    1. The loss between the model and itself on the same prompts. One side is packed in micro-batches, the other one is
       scored row by row. The result is the noise that a divergence must exceed.
    2. The log-probabilities of sampled tokens in the sampler and in the trainer. They show a wrong offset or mask.

    Returns the samples that it scored. Raises UserError if a difference exceeds `run.self_check_limit` or
    `run.sampler_gap_limit`.
    """
    batch = problems.batch(1)[:PROBLEMS]
    samples = [
        _sample(problem, rollout)
        for problem, rollout in zip(batch, _rollouts(settings, sampler, batch, prompts), strict=True)
    ]
    loss = DistillationLoss(
        config=InterpolationLossConfig(positions="none", temperature=settings.objective.loss.temperature),
        chunk_bytes=settings.objective.chunk_bytes,
        token_temperature=1.0,
        kernel=loss_kernel(settings.objective.kernel),
    )
    try:
        scores = policy.evaluate_loss(samples, loss, teach_itself=True)
    except FloatingPointError as error:
        raise UserError(f"self-check: {error}. The weights of {settings.model.hf_path} are damaged") from error
    floor = sum(score.loss_sum for score in scores) / sum(score.num_tokens for score in scores)
    gap = max(score.sampler_gap.largest for score in scores)
    run = settings.run
    progress.note(
        f"self-check: loss of the model against itself {floor:.2e} nats a token (limit {run.self_check_limit:g}); "
        f"sampler and trainer differ by {gap:.2e} nats at most (limit {run.sampler_gap_limit:g})",
        nats_per_token=floor,
        limit=run.self_check_limit,
        sampler_gap=gap,
        sampler_gap_limit=run.sampler_gap_limit,
    )
    if not floor <= run.self_check_limit:
        raise UserError(
            f"self-check: the model differs from itself by {floor:.3g} nats a token, above run.self_check_limit="
            f"{run.self_check_limit:g}; with FP8 try another megatron.fp8_recipe or raise the limit"
        )
    if not gap <= run.sampler_gap_limit:
        raise UserError(
            f"self-check: sampler and trainer differ by {gap:.3g} nats on a token, above "
            f"run.sampler_gap_limit={run.sampler_gap_limit:g}: generation and training do not see the same model"
        )
    return samples


def report_fp8_noise(settings: Settings, policy: "MegatronPolicy", samples: list[Sample], progress: Progress) -> None:
    """Prints the cosine between the gradients with FP8 and without.

    The model's loss against itself does not show this: with blockwise scaling it is 0, because no scale depends on
    other rows, and the gradient is as noisy as with one scale for a tensor.
    """
    loss = CrossEntropyLoss(chunk_bytes=settings.objective.chunk_bytes, kernel=loss_kernel(settings.objective.kernel))
    cosine = policy.fp8_gradient_cosine(samples, loss)
    progress.note(
        f"self-check: cosine {cosine:.4f} between the gradients with FP8 ({settings.megatron.fp8_recipe}) and without, "
        f"of {count_text(len(samples), 'sampled response')} (1: no noise)",
        fp8_gradient_cosine=cosine,
    )


def _rollouts(settings: Settings, sampler: Sampler, batch: list[Problem], prompts: Prompts) -> list[Rollout]:
    requests = [
        GenerationRequest(
            problem_id=problem.id,
            sample_index=0,
            prompt_ids=prompts.student_prompt(problem),
            key=derive_key(settings.run.seed, "self-check", problem.id),
        )
        for problem in batch
    ]
    sampling = SamplingParameters(
        max_new_tokens=min(TOKENS, settings.rollout.max_new_tokens),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        stop_ids=frozenset(prompts.tokenizer.stop_ids),
    )
    return sampler.generate(requests, sampling)


def _sample(problem: Problem, rollout: Rollout) -> Sample:
    """A rollout with the student's prompt for student and teacher."""
    return Sample(
        problem=problem,
        key=0,
        rollout=rollout,
        teacher_prompt_ids=rollout.prompt_ids,
    )
