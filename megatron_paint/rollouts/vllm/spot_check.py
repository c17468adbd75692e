"""Whether the servers sample with the trainer's weights: some of their log-probabilities against the trainer's."""

from collections.abc import Callable, Sequence

from megatron_paint.base.errors import UserError
from megatron_paint.policy import ScoredSequence
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.fleet import Fleet, Server

PROMPTS, TOKENS = 2, 4  # of each server; ours

Score = Callable[[Sequence[ScoredSequence]], list[tuple[float, ...]]]  # by the trainer, in nats, at temperature 1


class SpotCheck:
    """Samples a few tokens on every server after each update, and scores them with the trainer.

    The prompts are the longest ones of the first requests, and the same ones after every update: a server that kept the
    keys and values of old weights would read them there. It keeps only complete blocks of tokens (16 on a GPU, 128 on a
    CPU), so a short prompt would hide this.
    """

    def __init__(self, score: Score, *, limit: float):
        """limit: largest difference of a log-probability, in nats."""
        self.score, self.limit = score, limit
        self._requests: list[GenerationRequest] = []

    def sample(
        self, fleet: Fleet, requests: Sequence[GenerationRequest], *, version: str | None
    ) -> dict[str, list[Rollout]]:
        """The sampled tokens by the name of their server; called on rank 0."""
        if not self._requests:
            by_length = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.key))
            unlike = {request.prompt_ids: request for request in reversed(by_length)}
            self._requests = sorted(unlike.values(), key=lambda request: -len(request.prompt_ids))[:PROMPTS]
        plain = SamplingParameters(max_new_tokens=TOKENS, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset())
        found: dict[str, list[Rollout]] = {}

        async def ask(server: Server) -> None:
            async with server.client.watched():
                found[server.name] = [
                    await fleet.generate(server, request, plain, version=version, wants_logprobs=True)
                    for request in self._requests
                ]

        fleet.call_each(ask, "the spot check")
        return found

    def gap(self, found: dict[str, list[Rollout]]) -> float:
        """The largest difference in nats; all ranks call together. UserError: it is above the limit."""
        flat = [(name, rollout) for name, rollouts in found.items() for rollout in rollouts]
        if not flat:
            return 0.0
        try:
            scored = self.score([ScoredSequence(prompt_ids=r.prompt_ids, response_ids=r.response_ids) for _, r in flat])
        except FloatingPointError as error:
            raise UserError(f"the spot check of the servers: {error}. The training diverged") from error
        gaps = [
            (max(abs(mine - theirs) for mine, theirs in zip(logprobs, rollout.logprobs, strict=True)), name)
            for (name, rollout), logprobs in zip(flat, scored, strict=True)
        ]
        largest, name = max(gaps)
        if not largest <= self.limit:
            raise UserError(
                f"{name} and the trainer differ by {largest:.3g} nats on a token after an update of the weights, above "
                f"run.sampler_gap_limit={self.limit:g}: the server does not sample with the weights of the trainer"
            )
        return largest
