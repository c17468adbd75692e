"""Whether a server reports log-probabilities in the mode that the run needs.

No endpoint of vLLM 0.32 names the `--logprobs-mode` of a server, but its answers do. Of a token that is the only one
left after top-k, `processed_logprobs` reports 0, because it is computed after the cut. `raw_logprobs` reports what the
model says, and both report that of a greedy token.
"""

from collections.abc import Sequence

from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.client import Client

PROMPTS = 4  # of one token each; ours
TOLERANCE = 1e-3  # nats; ours


async def logprobs_mode_of(client: Client) -> str | None:
    """vLLM's name of a server's mode; None if it cannot be determined. ServerError: the server does not answer."""

    async def logprobs(*, temperature: float, top_k: int) -> list[float]:
        sampling = SamplingParameters(
            max_new_tokens=1, temperature=temperature, top_p=1.0, top_k=top_k, stop_ids=frozenset()
        )
        # One after another: in another batch the same logits may be rounded in another way.
        rollouts = [
            await client.generate(request, sampling, version=None, wants_logprobs=True) for request in _requests()
        ]
        return [rollout.logprobs[0] for rollout in rollouts]

    async with client.watched():
        cut = await logprobs(temperature=1.0, top_k=1)
        greedy = await logprobs(temperature=0.0, top_k=0)
    return mode_from(cut=cut, greedy=greedy)


def mode_from(*, cut: Sequence[float], greedy: Sequence[float]) -> str | None:
    """The mode that reports such log-probabilities of the most likely token after each prompt.

    cut: with top_k=1. greedy: at temperature 0. One prompt proves a mode. None if no prompt does: a model that is sure
    of its tokens reports 0 in each mode.
    """
    pairs = list(zip(cut, greedy, strict=True))
    if any(value > TOLERANCE for value in (*cut, *greedy)):
        return "raw_logits or processed_logits"
    if any(after > -TOLERANCE / 10 and before < -TOLERANCE for after, before in pairs):
        return "processed_logprobs"
    if any(after < -TOLERANCE and abs(after - before) < TOLERANCE / 10 for after, before in pairs):
        return "raw_logprobs"
    return None


def _requests() -> list[GenerationRequest]:
    return [GenerationRequest(problem_id="mode", sample_index=i, prompt_ids=(i,), key=i) for i in range(PROMPTS)]
