"""One vLLM server over HTTP: what it is asked, and what its answers must hold.

The server's `/health` says 200 while its engine hangs, and the server's status is 200 for a response that was cut by
somebody else. So liveness is asked of the engine (`/is_paused`), and every answer is checked.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.vllm import COLDEST, HOTTEST
from megatron_paint.records import Rollout, RolloutOrigin, WeightSpan
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.runtime.heartbeat import mark_progress

if TYPE_CHECKING:
    import httpx

COUNTED = "vllm:iteration_tokens_total_sum"
PROBES = 4  # questions to the engine within `hang_timeout_s`; ours


class ServerError(Exception):
    """A server answered wrongly, too late or not at all. What it holds is not to be trusted."""


class Client:
    """Asks one server. All methods raise ServerError if the server does not answer as it should."""

    def __init__(self, url: str, *, timeout: float):
        """timeout: seconds without an answer of the engine after which it counts as hung."""
        try:
            import httpx
        except ImportError as error:
            raise UserError("rollout.engine=vllm needs httpx: pip install 'megatron-paint[vllm]'") from error
        self.url, self.timeout = url.rstrip("/"), timeout
        self.not_ready = ""  # what was seen instead of an answer
        self._errors = (httpx.HTTPError, httpx.InvalidURL)
        # Servers close idle connections after 5 s by default; ours must be gone before.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1.0)
        # A proxy of the environment is for the internet, not for the servers of a run.
        self._http = httpx.AsyncClient(base_url=self.url, timeout=timeout, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    async def call(self, method: str, path: str, *, limited: bool = True, **arguments: Any) -> Any:
        """The JSON answer of the server. limited: the time of the client is the limit; otherwise there is none."""
        response = await self._response(method, path, limited=limited, **arguments)
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(f"{path} was not answered with JSON ({error})") from error

    async def call_text(self, path: str, **arguments: Any) -> str:
        """The answer to a POST that is no JSON."""
        return (await self._response("POST", path, limited=True, **arguments)).text

    async def _response(self, method: str, path: str, *, limited: bool, **arguments: Any) -> "httpx.Response":
        limit = {} if limited else {"timeout": None}
        try:
            response = await self._http.request(method, path, **limit, **arguments)
        except self._errors as error:
            raise ServerError(f"{path} got no answer ({type(error).__name__}: {error})") from error
        if response.status_code != 200:
            raise ServerError(f"{path} was answered with status {response.status_code}: {response.text[:300]}")
        return response

    async def is_ready(self) -> bool:
        """Whether the engine answers. A server that still starts refuses the connection, or answers with status 503."""
        try:
            response = await self._http.request("GET", "/is_paused")
        except self._errors as error:
            self.not_ready = f"{type(error).__name__}: {error}"
            return False
        if response.status_code == 404:
            raise ServerError(
                "it has no /is_paused: start it with VLLM_SERVER_DEV_MODE=1, and give its address without a path, such "
                "as http://node7:8000"
            )
        self.not_ready = f"status {response.status_code}"
        return response.status_code == 200

    async def is_paused(self) -> bool:
        """Whether the server samples nothing until it is resumed."""
        return bool(field_of(await self.call("GET", "/is_paused"), "is_paused"))

    async def max_model_len(self) -> int:
        """Most tokens of a prompt and its response."""
        return int(field_of(await self.call("GET", "/v1/models"), "data", 0, "max_model_len"))

    async def weight_version(self) -> str:
        """The version of the weights that the engine samples with."""
        return str(field_of(await self.call("GET", "/weight_info"), "weight_version"))

    async def tokens(self) -> float | None:
        """How many tokens the engine has computed; None if the server does not count them."""
        lines = (await self._response("GET", "/metrics", limited=True)).text.splitlines()
        counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(COUNTED)]
        return sum(counts) if counts else None

    @asynccontextmanager
    async def watched(self):
        """Raises ServerError inside if the engine stops answering, or computes no token for the client's time.

        Requests inside need no time limit of their own. As long as tokens are computed, the run makes progress.
        """
        body = asyncio.current_task()
        failure: list[ServerError] = []

        async def watch() -> None:
            counted, moved = None, time.monotonic()
            while True:
                await asyncio.sleep(self.timeout / PROBES)
                try:
                    await self.call("GET", "/is_paused")
                    before, counted = counted, await self.tokens()
                    if counted != before:
                        moved = time.monotonic()
                        mark_progress()
                    elif time.monotonic() - moved > self.timeout:
                        raise ServerError(
                            f"its engine has computed no token for {self.timeout:g} s, with open requests"
                        )
                except ServerError as error:
                    failure.append(error)
                    body.cancel()
                    return

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if failure:
                body.uncancel()
                raise failure[0] from None
            raise
        finally:
            watcher.cancel()

    async def generate(
        self,
        request: GenerationRequest,
        sampling: SamplingParameters,
        *,
        version: str | None,
        adapter: str | None = None,
        wants_logprobs: bool,
    ) -> Rollout:
        """Samples one response.

        version: what the weights of each token must be; None: not checked. adapter: the name of the one to sample with.
        """
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": sampling_params(request, sampling, wants_logprobs=wants_logprobs),
            **({} if adapter is None else {"model": adapter}),
        }
        answer = await self.call("POST", "/inference/v1/generate", json=body, limited=False)
        rollout = self._rollout(request, sampling, field_of(answer, "choices", 0), version, wants_logprobs)
        if adapter is None:
            return rollout
        # vLLM's versions are those of the base weights.
        span = WeightSpan(version=adapter, start=0, end=len(rollout.response_ids))
        return replace(rollout, origin=replace(rollout.origin, weights=(span,)))

    def _rollout(
        self,
        request: GenerationRequest,
        sampling: SamplingParameters,
        choice: Any,
        version: str | None,
        wants_logprobs: bool,
    ) -> Rollout:
        tokens, reason = field_of(choice, "token_ids"), field_of(choice, "finish_reason")
        spans = tuple(
            WeightSpan(version=str(field_of(span, "version")), start=int(span["start"]), end=int(span["end"]))
            for span in choice.get("weight_versions") or ()
        )
        if reason not in ("stop", "length"):
            raise ServerError(f"a response ended with finish_reason {reason!r}: another client stopped it")
        finished = bool(tokens) and tokens[-1] in sampling.stop_ids
        if not tokens or len(tokens) > sampling.max_new_tokens or finished != (reason == "stop"):
            raise ServerError(
                f"a response of {count_text(len(tokens or ()), 'token')} ended with finish_reason {reason!r}"
            )
        if not finished and len(tokens) != sampling.max_new_tokens:
            raise ServerError(
                f"a response was cut after {len(tokens)} of {count_text(sampling.max_new_tokens, 'token')}: the "
                "server's --max-model-len is too small"
            )
        if version is not None and {span.version for span in spans} != {version}:
            held = ", ".join(sorted({span.version for span in spans})) or "no version"
            raise ServerError(f"tokens were sampled with weights {held}, not {version}")
        logprobs = None
        if wants_logprobs:
            entries = field_of(choice, "logprobs", "content")
            logprobs = tuple(float(field_of(entry, "logprob")) for entry in entries)
            if [entry["token_id"] for entry in entries] != tokens:
                raise ServerError("the log-probabilities are not those of the tokens")
        return Rollout(
            problem_id=request.problem_id,
            sample_index=request.sample_index,
            prompt_ids=request.prompt_ids,
            response_ids=tuple(tokens),
            logprobs=logprobs,
            finished=finished,
            origin=RolloutOrigin(engine="vllm", server=self.url, weights=spans, finish_reason=reason),
        )


def sampling_params(
    request: GenerationRequest, sampling: SamplingParameters, *, wants_logprobs: bool
) -> dict[str, Any]:
    """vLLM's sampling parameters for a request.

    All are named, because a server may take other defaults from a generation_config.json.
    """
    return {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.key,
        "stop_token_ids": sorted(sampling.stop_ids),
        "ignore_eos": True,  # the stop ids have it
        "detokenize": False,
        "logprobs": 0 if wants_logprobs else None,
    }


def field_of(answer: Any, *path: str | int) -> Any:
    """A value inside a JSON answer; ServerError names the place that is missing."""
    for step in path:
        try:
            answer = answer[step]
        except (KeyError, IndexError, TypeError) as error:
            named = ".".join(map(str, path))
            raise ServerError(f"the answer has no {named}: is the server of vLLM 0.32 or newer?") from error
    return answer


def check_requests(
    requests: Sequence[GenerationRequest], sampling: SamplingParameters, *, vocab_size: int, max_model_len: int
) -> None:
    """Raises UserError unless every server can sample the requests. A server does not survive an id out of range."""
    if sampling.temperature != 0 and not COLDEST <= sampling.temperature <= HOTTEST:
        raise UserError(
            f"the sampling temperature is {sampling.temperature:g}, and vLLM takes 0, and {COLDEST:g} to {HOTTEST:g}: "
            "change it"
        )
    for request in requests:
        if not request.prompt_ids:
            raise UserError(f"problem {request.problem_id!r}: its prompt has no token")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            raise UserError(
                f"problem {request.problem_id!r}: its prompt holds id {max(request.prompt_ids)}, and the model has "
                f"ids 0 to {vocab_size - 1}"
            )
        if (needed := len(request.prompt_ids) + sampling.max_new_tokens) > max_model_len:
            raise UserError(
                f"problem {request.problem_id!r}: prompt and response may have {needed} tokens, and the vLLM server "
                f"takes {max_model_len}: raise that (rollout.vllm.max_model_len, --max-model-len), or lower "
                "max_new_tokens"
            )
