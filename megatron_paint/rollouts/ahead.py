"""Rollouts that servers sample while the step before trains (`rollout.ahead: 1`)."""

import dataclasses
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import RolloutSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.policy import ScoredSequence
from megatron_paint.records import Problem, Rollout, RolloutOrigin, WeightSpan
from megatron_paint.rollouts.engine import GenerationRequest, Sampler, SamplingParameters
from megatron_paint.rollouts.source import RolloutSource

# Log-probabilities of the policy's current weights, in nats, at the temperature of the sampling.
Score = Callable[[Sequence[ScoredSequence]], list[tuple[float, ...]]]


class AheadSampler(Sampler, Protocol):
    """A rollout engine that can sample while this process computes."""

    def start(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> None:
        """Starts to sample with the weights that the engine has, and returns at once."""

    def finish(self) -> dict[int, Rollout]:
        """Waits for what was started. Returns the rollouts by the number of their request.

        Those are missing that no server could sample.
        """


@dataclass(frozen=True)
class Ahead:
    """What was sampled for a later step."""

    step: int
    rollouts: Sequence[Rollout]  # in any order; what is missing is sampled in its step
    is_scored: bool  # all have log-probabilities, if the source needs them


class RolloutsAhead(RolloutSource):
    """The rollouts of step N are sampled while step N - 1 trains, with the weights that step N - 1 started from.

    Those of the first step of a start are sampled in it. So are those that no server could sample ahead: they are of
    the current weights. If the engine has no log-probabilities at these settings, the policy scores the rollouts before
    it changes the weights that sampled them.
    """

    def __init__(
        self,
        sampler: AheadSampler,
        prompts: Prompts,
        settings: RolloutSettings,
        *,
        samples: int,
        seed: int,
        upcoming: Callable[[int], Sequence[Problem]],
        score: Score | None,
    ):
        """upcoming: the problems of a step; none after the last one. score: None if log-probabilities are not missing
        or not needed.
        """
        super().__init__(sampler, prompts, settings, samples=samples, seed=seed)
        self.importance_limit = settings.importance_limit
        self.upcoming, self.score = upcoming, score
        self._started: tuple[int, list[GenerationRequest]] | None = None  # the step, and what was asked for it
        self._ahead: Ahead | None = None

    def rollouts(self, problems: Sequence[Problem], *, step: int) -> list[Rollout]:
        """All responses to the first problem, then all to the second, and so on; starts to sample for the next step."""
        self.get_ahead_ready()
        requests = self.requests(problems, step=step)
        found = self._found(requests, step)
        self.sampler.sync_weights(step)
        missing = [number for number in range(len(requests)) if number not in found]
        if missing:
            sampled = self.sampler.generate([requests[number] for number in missing], self.sampling)
            found |= zip(missing, sampled, strict=True)
        self._ahead = None
        if coming := self.requests(self.upcoming(step + 1), step=step + 1):
            self.sampler.start(coming, self.sampling)
            self._started = (step + 1, coming)
        return [found[number] for number in range(len(requests))]

    def get_ahead_ready(self) -> None:
        """Waits for what was sampled ahead and scores it, if that is necessary; else does nothing.

        It runs before the weights change. In a step without a change it runs in the next step: the weights are the same
        still.
        """
        if self.score is None:
            return
        self._wait()
        if self._ahead is None or self._ahead.is_scored:
            return
        rollouts = self._ahead.rollouts
        found = self.score([ScoredSequence(prompt_ids=r.prompt_ids, response_ids=r.response_ids) for r in rollouts])
        scored = [dataclasses.replace(r, logprobs=logprobs) for r, logprobs in zip(rollouts, found, strict=True)]
        self._ahead = Ahead(self._ahead.step, scored, is_scored=True)

    def state_dict(self) -> dict[str, Any]:
        """The rollouts that wait for their step: they cannot be sampled again, because their weights are gone."""
        self._wait()
        if self._ahead is None:
            return {}
        rollouts = [_to_json(rollout) for rollout in self._ahead.rollouts]
        return {"step": self._ahead.step, "is_scored": self._ahead.is_scored, "rollouts": rollouts}

    def load_state_dict(self, state: Mapping[str, Any], problems: Sequence[Problem]) -> tuple[str, ...]:
        if not state:
            return ()
        try:
            rollouts = [_from_json(entry) for entry in state["rollouts"]]
            step, is_scored = int(state["step"]), bool(state["is_scored"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint's rollouts of the next step (rollout.ahead) cannot be read ({error!r}): remove the "
                "checkpoint to resume from the one before it"
            ) from error
        asked = {_place(request): request.prompt_ids for request in self.requests(problems, step=step)}
        fitting = [rollout for rollout in rollouts if asked.get(_place(rollout)) == rollout.prompt_ids]
        self._ahead = Ahead(step, fitting, is_scored)
        if gone := len(rollouts) - len(fitting):
            return (
                f"{gone} of the {len(rollouts)} rollouts that were sampled ahead are of other problems or prompts: the "
                "step samples new ones",
            )
        return ()

    def _wait(self) -> None:
        """Waits for what was started, if anything was."""
        if self._started is None:
            return
        (step, requests), self._started = self._started, None
        found = self.sampler.finish()
        rollouts = [_behind(found[number]) for number in range(len(requests)) if number in found]
        self._ahead = Ahead(step, rollouts, is_scored=self.score is None)

    def _found(self, requests: Sequence[GenerationRequest], step: int) -> dict[int, Rollout]:
        """What was sampled ahead for this step, by the number of its request."""
        self._wait()
        if self._ahead is None or self._ahead.step != step:
            return {}
        numbers = {_place(request): number for number, request in enumerate(requests)}
        return {numbers[_place(rollout)]: rollout for rollout in self._ahead.rollouts}


def _place(of: GenerationRequest | Rollout) -> tuple[str, int]:
    return (of.problem_id, of.sample_index)


def _behind(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, origin=dataclasses.replace(rollout.origin, behind=1))


def _to_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout in JSON's types, exactly: ids as 32-bit integers, log-probabilities as 64-bit numbers."""
    return dataclasses.asdict(rollout) | {
        "prompt_ids": _packed(rollout.prompt_ids, "<i4"),
        "response_ids": _packed(rollout.response_ids, "<i4"),
        "logprobs": None if rollout.logprobs is None else _packed(rollout.logprobs, "<f8"),
    }


def _from_json(entry: Mapping[str, Any]) -> Rollout:
    origin = entry["origin"]
    spans = tuple(WeightSpan(**span) for span in origin["weights"])
    return Rollout(
        **{
            **entry,
            "prompt_ids": _unpacked(entry["prompt_ids"], "<i4"),
            "response_ids": _unpacked(entry["response_ids"], "<i4"),
            "logprobs": None if entry["logprobs"] is None else _unpacked(entry["logprobs"], "<f8"),
            "origin": RolloutOrigin(**{**origin, "weights": spans}),
        }
    )


def _packed(values: Sequence[float], kind: str) -> str:
    return b64encode(np.asarray(values, kind).tobytes()).decode("ascii")


def _unpacked(text: str, kind: str) -> tuple:
    return tuple(np.frombuffer(b64decode(text, validate=True), kind).tolist())
