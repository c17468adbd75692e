"""The rollouts of a training step, for every objective that learns from them."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_paint.base.keys import derive_key
from megatron_paint.config.settings import RolloutSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.records import Problem, Rollout
from megatron_paint.rollouts.engine import GenerationRequest, Sampler, SamplingParameters


def sample_key(seed: int, *, step: int, problem: Problem, index: int = 0) -> int:
    """The key that holds all randomness of one sample of a step; independent of the layout and of its place in a batch.

    seed: `run.seed`. index: from 0 to samples per problem - 1.
    """
    return derive_key(seed, step, problem.id, index)


class RolloutSource:
    """`samples` responses to each problem's student prompt, from the sampler of the run, with the current weights."""

    importance_limit: float | None = None  # of the responses of older weights: here there are none

    def __init__(self, sampler: Sampler, prompts: Prompts, settings: RolloutSettings, *, samples: int, seed: int):
        self.sampler = sampler
        self.prompts = prompts
        self.samples = samples
        self.seed = seed
        self.keep = settings.keep
        self.sampling = SamplingParameters.from_settings(settings, stop_ids=prompts.tokenizer.stop_ids)

    def rollouts(self, problems: Sequence[Problem], *, step: int) -> list[Rollout]:
        """All responses to the first problem, then all to the second, and so on."""
        self.sampler.sync_weights(step)
        rollouts = self.sampler.generate(self.requests(problems, step=step), self.sampling)
        self.sampler.release_memory()
        return rollouts

    def state_dict(self, *, wait: bool = True) -> dict[str, Any]:
        """What a checkpoint must hold, in JSON's types; empty: there is nothing. All ranks call together.

        wait: for rollouts that are being sampled; else only those that are complete are returned.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any], problems: Sequence[Problem]) -> tuple[str, ...]:
        """Continues from what `state_dict` returned. Returns messages to the user.

        problems: those of the next step.
        """
        if not state:
            return ()
        return ("the checkpoint's rollouts of the next step are not used, because rollout.ahead is 0 now",)

    def requests(self, problems: Sequence[Problem], *, step: int) -> list[GenerationRequest]:
        """What the sampler is asked for, in the order of the rollouts."""
        return [
            GenerationRequest(
                problem_id=problem.id,
                sample_index=index,
                prompt_ids=self.prompts.student_prompt(problem),
                key=sample_key(self.seed, step=step, problem=problem, index=index),
                step=step,
            )
            for problem in problems
            for index in range(self.samples)
        ]
