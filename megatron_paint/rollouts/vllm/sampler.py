"""The rollout engine `vllm`: rank 0 talks to the servers, and every rank gets the rollouts."""

import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from megatron_paint.config.vllm import has_logprobs
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.fleet import Fleet
from megatron_paint.rollouts.vllm.spot_check import SpotCheck
from megatron_paint.rollouts.vllm.weights import WeightSource
from megatron_paint.runtime.rank_zero import OnRankZero


class Transfer(Protocol):
    """How the trainer's weights reach the servers."""

    shares_gpus: bool  # the servers are on the GPUs of the ranks, and sleep while a step trains

    def send(self, fleet: Fleet | None, version: str) -> None:
        """One update of all live servers. All ranks call together; `fleet` is None on all ranks but 0."""


class VllmSampler:
    """Implements `Sampler`. Every rank has one; only that of rank 0 has the fleet.

    After each update of the weights, and before anything is sampled with them, a spot check compares log-probabilities
    of the servers with the trainer's. A server that fails is killed, its prompts are sampled by the others, and it is
    started again from an export of the current weights.
    """

    def __init__(
        self,
        fleet: Fleet | None,
        *,
        weights: WeightSource | None,
        transfer: Transfer | None,
        spot_check: SpotCheck | None,
        start_model: Path,
        exports: Path | None,
        on_rank_zero: OnRankZero,
    ):
        """weights, transfer, spot_check: None for a model that does not change (an evaluation).

        start_model: the Hugging Face folder that the servers start with. exports: folder for those that they are
        started with again.
        """
        self.fleet, self.weights, self.transfer, self.spot_check = fleet, weights, transfer, spot_check
        self.start_model, self.exports, self.on_rank_zero = start_model, exports, on_rank_zero
        # Of this start of this run: another run at the same servers, or an earlier start, has other versions.
        self.nonce = on_rank_zero(lambda: uuid.uuid4().hex[:8])
        self.version: str | None = None
        self.checked = True
        self._measured: dict[str, float] = {}
        # On rank 0: what `start` has started, and the rollouts that are complete.
        self._started: tuple[Future[dict[int, Rollout]], dict[int, Rollout]] | None = None

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """One rollout per request, in order, on every rank."""
        self._revive()
        found: dict[int, Rollout] = {}
        while True:
            self.on_rank_zero(lambda: self.fleet.check(requests, sampling))
            self._check_weights(requests)
            found = self.on_rank_zero(lambda found=found: self._submit(requests, sampling, found).result())
            if len(found) == len(requests):
                return [found[number] for number in range(len(requests))]
            self._revive()

    def start(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> None:
        """Starts to sample with the weights that the servers have, and returns at once."""
        self._revive()
        self.on_rank_zero(lambda: self.fleet.check(requests, sampling))
        self._check_weights(requests)

        def submit() -> None:
            found: dict[int, Rollout] = {}
            self._started = (self._submit(requests, sampling, found), found)

        self.on_rank_zero(submit)

    def finish(self, *, wait: bool = True) -> dict[int, Rollout]:
        """The rollouts of `start` by the number of their request, on every rank.

        Rollouts that no server could sample are missing. Without `wait`, so are those that are not complete.
        """

        def take() -> dict[int, Rollout]:
            (started, found), self._started = self._started, None
            if wait:
                return started.result()
            started.cancel()
            return dict(found)

        return self.on_rank_zero(take)

    def sync_weights(self, step: int) -> None:
        """Sends the weights that training step `step` starts from to all servers, unless they have them.

        What `start` has started is completed first.
        """
        version = f"{self.nonce}/{step - 1}"
        if self.weights is None or version == self.version:
            return
        self.on_rank_zero(self._wait)
        start = time.perf_counter()
        if self.transfer.shares_gpus:
            self.weights.free_memory()
        self._revive(before=True)
        self.transfer.send(self.fleet, version)
        self.version, self.checked = version, False
        self._revive()
        self._measured["rollout/update_seconds"] = time.perf_counter() - start

    def release_memory(self) -> None:
        """Lets servers on the GPUs of the ranks sleep. They drop their weights, so the next update sends them again."""
        if self.transfer is None or not self.transfer.shares_gpus or self.version is None:
            return
        self.on_rank_zero(lambda: self.fleet.sleep())
        self.version = None

    def metrics(self) -> dict[str, float]:
        """What was measured since the last call."""
        measured, self._measured = self._measured, {}
        return measured

    def close(self) -> None:
        """Removes the exports that servers were started with again; called on rank 0."""
        if self.exports is not None:
            shutil.rmtree(self.exports, ignore_errors=True)

    def _submit(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParameters, found: dict[int, Rollout]
    ) -> Future[dict[int, Rollout]]:
        mode, cut = self.fleet.engine.logprobs_mode, {"top_p": sampling.top_p, "top_k": sampling.top_k}
        wants = has_logprobs(mode, temperature=sampling.temperature, **cut)
        return self.fleet.sample(requests, sampling, version=self.version, wants_logprobs=wants, found=found)

    def _wait(self) -> None:
        """Waits for what `start` has started; `finish` still returns it."""
        if self._started is not None:
            self._started[0].result()

    def _check_weights(self, requests: Sequence[GenerationRequest]) -> None:
        """The spot check, once after each update. Servers that fail in it are started again, and checked as well."""
        while not self.checked and self.spot_check is not None:
            found = self.on_rank_zero(lambda: self.spot_check.sample(self.fleet, requests, version=self.version))
            self._measured["rollout/spot_check_gap"] = self.spot_check.gap(found)
            self.checked = True
            self._revive()  # a server that failed in the check; it is checked as well

    def _revive(self, *, before: bool = False) -> bool:
        """Starts failed servers again, from an export of the current weights. Returns whether there were any.

        before: an update follows, which sends the weights. So the servers start from the model of the first start.
        """
        if not self.on_rank_zero(lambda: bool(self.fleet.failed)):
            return False
        if self.transfer is not None and self.transfer.shares_gpus:
            self.weights.free_memory()  # a server that starts needs its part of the GPU
        model = self.start_model
        if self.weights is not None and not before and self.on_rank_zero(lambda: self.fleet.restarts_with_weights):
            model = self.exports / "restart"
            self.weights.export(model)
        version = None if before else self.version
        self.on_rank_zero(lambda: self.fleet.restart_failed(model, version=version))
        if model != self.start_model:
            self.on_rank_zero(lambda: shutil.rmtree(model, ignore_errors=True))
        self.checked = False
        return True
