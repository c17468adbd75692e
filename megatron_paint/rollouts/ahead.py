"""Rollouts that servers sample while the step before trains (`rollout.ahead: 1`)."""

import dataclasses
import hashlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import RolloutSettings
from megatron_paint.data.prompts import Prompts
from megatron_paint.policy import ScoredSequence
from megatron_paint.records import Problem, Rollout, RolloutOrigin, TokenIds, WeightSpan
from megatron_paint.rollouts.engine import GenerationRequest, Sampler, SamplingParameters
from megatron_paint.rollouts.source import RolloutSource

# Log-probabilities of the policy's current weights, in nats, at the temperature of the sampling.
Score = Callable[[Sequence[ScoredSequence]], list[tuple[float, ...]]]
Place = tuple[str, int]  # problem id, sample index


class AheadSampler(Sampler, Protocol):
    """A rollout engine that can sample while this process computes."""

    def start(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> None:
        """Starts to sample with the weights that the engine has, and returns at once."""

    def finish(self, *, wait: bool = True) -> dict[int, Rollout]:
        """The rollouts of `start` by the number of their request.

        Rollouts that no server could sample are missing. Without `wait`, so are those that are not complete.
        """


class RolloutsAhead(RolloutSource):
    """The rollouts of step N are sampled while step N - 1 trains, with the weights that step N - 1 started from.

    Those of the first step of a run are sampled in it. So are rollouts that no server could sample ahead: they are of
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
        """upcoming: the problems of a step; none after the last one.

        score: None if the engine has log-probabilities, or if nothing needs them.
        """
        super().__init__(sampler, prompts, settings, samples=samples, seed=seed)
        self.importance_limit = settings.importance_limit
        self.upcoming, self.score = upcoming, score
        self._step: int | None = None  # the step that was sampled for
        self._sampling: list[GenerationRequest] = []  # what the engine samples now
        self._found: dict[Place, Rollout] = {}  # in the order of the requests

    def rollouts(self, problems: Sequence[Problem], *, step: int) -> list[Rollout]:
        """All responses to the first problem, then all to the second, and so on; starts to sample for the next step."""
        self.score_ahead()
        self._wait()
        found = self._found if self._step == step else {}
        requests = self.requests(problems, step=step)
        missing = [request for request in requests if _place(request) not in found]
        coming = self.requests(self.upcoming(step + 1), step=step + 1)
        if missing or coming:
            self.sampler.sync_weights(step)
        if missing:
            sampled = self.sampler.generate(missing, self.sampling)
            found |= zip(map(_place, missing), sampled, strict=True)
        if coming:
            self.sampler.start(coming, self.sampling)
        self._step, self._sampling, self._found = step + 1, coming, {}
        return [found[_place(request)] for request in requests]

    def score_ahead(self) -> None:
        """Waits for what was sampled ahead and scores it, if that is necessary; else does nothing.

        The policy calls it before it changes the weights. In a step without an update it runs at the start of the next
        step: the weights are still the same. FloatingPointError: a log-probability is not finite; the step will sample
        again.
        """
        if self.score is None:
            return
        self._wait()
        rollouts = [rollout for rollout in self._found.values() if rollout.logprobs is None]
        if not rollouts:
            return
        found, self._found = self._found, {}
        logprobs = self.score([ScoredSequence(prompt_ids=r.prompt_ids, response_ids=r.response_ids) for r in rollouts])
        scored = [dataclasses.replace(r, logprobs=found) for r, found in zip(rollouts, logprobs, strict=True)]
        self._found = found | {_place(rollout): rollout for rollout in scored}

    def state_dict(self, *, wait: bool = True) -> dict[str, Any]:
        """The rollouts that wait for their step: they cannot be sampled again, because their weights are gone."""
        self._wait(complete=wait)
        if not self._found:
            return {}
        rollouts = [_to_json(rollout) for rollout in self._found.values()]
        return {"step": self._step, "made_by": self._made_by(), "rollouts": rollouts}

    def load_state_dict(self, state: Mapping[str, Any], problems: Sequence[Problem]) -> tuple[str, ...]:
        if not state:
            return ()
        if state.get("made_by") != self._made_by():
            return (
                "the step after the checkpoint samples its rollouts again, because the settings of the sampling "
                "changed after they were sampled (rollout.ahead)",
            )
        try:
            step, entries = int(state["step"]), state["rollouts"]
            asked = {_place(request): request for request in self.requests(problems, step=step)}
            found = {(entry["problem_id"], entry["sample_index"]): entry for entry in entries}
            fitting = [r for place, r in asked.items() if place in found and found[place]["prompt"] == _digest(r)]
            self._found = {_place(r): _from_json(found[_place(r)], r) for r in fitting}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint's rollouts of the next step (rollout.ahead) cannot be read ({error!r}): remove the "
                "checkpoint to resume from the one before it"
            ) from error
        self._step = step
        if gone := len(entries) - len(fitting):
            return (
                f"{gone:,} of the {count_text(len(entries), 'rollout')} that were sampled ahead "
                f"{agreeing(gone, 'is', 'are')} of other problems or prompts: the step samples new ones",
            )
        return ()

    def _made_by(self) -> dict[str, Any]:
        """What the rollouts depend on besides weights and prompts, and whether the policy scores them."""
        sampling = dataclasses.asdict(self.sampling) | {"stop_ids": sorted(self.sampling.stop_ids)}
        return {**sampling, "seed": self.seed, "scores": self.score is not None}

    def _wait(self, *, complete: bool = True) -> None:
        """Waits for what the engine samples, if it does. Without `complete`, takes what there is."""
        if not self._sampling:
            return
        requests, self._sampling = self._sampling, []
        found = self.sampler.finish(wait=complete)
        self._found = {_place(requests[number]): _marked_behind(found[number]) for number in sorted(found)}


def _place(of: GenerationRequest | Rollout) -> Place:
    return (of.problem_id, of.sample_index)


def _marked_behind(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, origin=dataclasses.replace(rollout.origin, behind=1))


def _to_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout in JSON's types, exactly: ids as 32-bit integers, log-probabilities as 64-bit numbers."""
    return {
        "problem_id": rollout.problem_id,
        "sample_index": rollout.sample_index,
        "prompt": _digest(rollout),
        "response_ids": _packed(rollout.response_ids, "<i4"),
        "logprobs": None if rollout.logprobs is None else _packed(rollout.logprobs, "<f8"),
        "finished": rollout.finished,
        "origin": dataclasses.asdict(rollout.origin),
    }


def _from_json(entry: Mapping[str, Any], request: GenerationRequest) -> Rollout:
    origin = entry["origin"]
    return Rollout(
        problem_id=request.problem_id,
        sample_index=request.sample_index,
        prompt_ids=request.prompt_ids,
        response_ids=_unpacked(entry["response_ids"], "<i4"),
        logprobs=None if entry["logprobs"] is None else _unpacked(entry["logprobs"], "<f8"),
        finished=entry["finished"],
        origin=RolloutOrigin(**{**origin, "weights": tuple(WeightSpan(**span) for span in origin["weights"])}),
    )


def _digest(of: GenerationRequest | Rollout) -> str:
    """Of the prompt."""
    return hashlib.sha256(_packed(of.prompt_ids, "<i4").encode()).hexdigest()[:16]


def _packed(values: Sequence[float], kind: str) -> str:
    return b64encode(np.asarray(values, kind).tobytes()).decode("ascii")


def _unpacked(text: str, kind: str) -> TokenIds | tuple[float, ...]:
    return tuple(np.frombuffer(b64decode(text, validate=True), kind).tolist())
