"""The responses of a batch while they are decoded: all that changes with a token is on the device.

Axes: R rows of the batch, L rows that are still decoded, N new tokens, Z stop ids.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_paint.base.keys import uniforms
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters


class DecodedRows:
    """Tokens, log-probabilities and random numbers of a batch. Only `unfinished` and `rollouts` wait for the device."""

    def __init__(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParameters, device: torch.device
    ) -> None:
        self.requests = requests
        self.stop_ids = sampling.stop_ids
        shape = (len(requests), sampling.max_new_tokens)
        uniform_RN = np.stack([uniforms(request.key, sampling.max_new_tokens) for request in requests])
        self.live = list(range(len(requests)))  # the rows that are still decoded
        self.step = 0  # tokens that each of them has
        self._live_L = torch.arange(len(requests), device=device)
        self._uniform_LN = torch.from_numpy(uniform_RN).to(device)
        self._prompt_L = torch.tensor([len(request.prompt_ids) for request in requests], device=device)
        self._last_L = torch.zeros(len(requests), dtype=torch.int64, device=device)
        self._finished_L = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self._stop_Z = torch.tensor(sorted(self.stop_ids), dtype=torch.int64, device=device)
        self._token_RN = torch.zeros(shape, dtype=torch.int64, device=device)
        self._logp_RN = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def uniform(self) -> Tensor:
        """The random numbers [L] of the next tokens: float64."""
        return self._uniform_LN[:, self.step]

    @property
    def inputs(self) -> Tensor:
        """The last token of each row: [L]. A finished row repeats it until it is dropped; nothing reads the result."""
        return self._last_L

    @property
    def positions(self) -> Tensor:
        """The positions [L] of `inputs`."""
        return self._prompt_L + (self.step - 1)

    @property
    def end(self) -> int:
        """One past the largest of these positions."""
        return max(len(self.requests[row].prompt_ids) for row in self.live) + self.step

    def add(self, token_L: Tensor, logp_L: Tensor) -> None:
        """Adds one token to each row: ids, and log-probabilities in float64."""
        self._last_L = torch.where(self._finished_L, self._last_L, token_L)
        self._token_RN[self._live_L, self.step] = self._last_L
        self._logp_RN[self._live_L, self.step] = logp_L
        self._finished_L = (self._last_L[:, None] == self._stop_Z).any(-1)
        self.step += 1

    def unfinished(self) -> list[int]:
        """Places in `live` of the rows without a stop token."""
        return [place for place, finished in enumerate(self._finished_L.tolist()) if not finished]

    def keep(self, places: Sequence[int]) -> None:
        """Decodes only the rows at these places of `live` from now on."""
        self.live = [self.live[place] for place in places]
        place_L = torch.tensor(places, device=self._live_L.device)
        for name in ("_live_L", "_uniform_LN", "_prompt_L", "_last_L", "_finished_L"):
            setattr(self, name, getattr(self, name)[place_L])

    def rollouts(self) -> list[Rollout]:
        """The responses, each up to its first stop token."""
        found = []
        rows = self._token_RN[:, : self.step].tolist(), self._logp_RN[:, : self.step].tolist()
        for request, tokens, logprobs in zip(self.requests, *rows, strict=True):
            stops = (place for place, token in enumerate(tokens) if token in self.stop_ids)
            length = next(stops, len(tokens) - 1) + 1
            found.append(
                Rollout(
                    problem_id=request.problem_id,
                    sample_index=request.sample_index,
                    prompt_ids=request.prompt_ids,
                    response_ids=tuple(tokens[:length]),
                    logprobs=tuple(logprobs[:length]),
                    finished=tokens[length - 1] in self.stop_ids,
                )
            )
        return found
