"""The vLLM servers of a run: sampling on all of them, updates of all of them, and what happens when one fails.

Only rank 0 has a fleet. Its event loop has its own thread, so that it samples while the trainer computes.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_paint.base.errors import UserError
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.balance import balanced
from megatron_paint.rollouts.vllm.client import Client, ServerError, check_requests, field_of
from megatron_paint.rollouts.vllm.command import ServerOptions, server_command, server_environment
from megatron_paint.rollouts.vllm.logprobs_check import logprobs_mode_of
from megatron_paint.rollouts.vllm.process import ServerProcess, free_port
from megatron_paint.runtime.heartbeat import mark_progress
from megatron_paint.runtime.work import work

T = TypeVar("T")

POLL_SECONDS = 0.5


@dataclass
class Server:
    """One server, and whether it can be used."""

    number: int
    client: Client
    process: ServerProcess | None  # None: given by a URL
    failed: str | None = None  # why it is not used any more
    longest: int = 0  # most tokens of a prompt and its response
    asleep: bool = False  # it has no weights, and no memory for keys and values

    @property
    def name(self) -> str:
        return f"vLLM server {self.number} ({self.client.url})"

    def check_process(self) -> None:
        """ServerError: its process has ended."""
        if self.process is not None and not self.process.runs:
            raise ServerError(self.process.last_words() or "its process ended without a word")


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder, and the name under which servers know it. The folder must stay as long as it is loaded."""

    name: str
    folder: Path


class Fleet:
    """Starts or finds the servers. A method blocks until its work is done, unless it returns a future."""

    def __init__(
        self,
        engine: ServerOptions,
        *,
        vocab_size: int,
        logs: Path,
        note: Callable[[str], None],
    ):
        """logs: folder of what our servers print. note: shows a line to the user."""
        self.engine, self.settings = engine, engine.settings
        self.vocab_size, self.logs, self.note = vocab_size, logs, note
        self.init_info: Mapping[str, Any] | None = None
        self.adapter: Adapter | None = None  # the one that is sampled with
        self.restarts_left = self.settings.restarts
        self._ports: set[int] = set()  # that servers have, or will take when they have imported vLLM
        self._servers: dict[int, Server] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()

    @property
    def live(self) -> list[Server]:
        """The servers that can be used."""
        return [server for server in self._servers.values() if server.failed is None]

    @property
    def failed(self) -> list[Server]:
        return [server for server in self._servers.values() if server.failed is not None]

    @property
    def longest(self) -> int | None:
        """The most tokens of a prompt and its response that every live server takes; None: no server lives."""
        return min((server.longest for server in self.live), default=None)

    @property
    def restarts_with_weights(self) -> bool:
        """Whether a failed server will be started again with the weights of a folder, and not with adapters."""
        return self.adapter is None and any(server.process is not None for server in self.failed)

    def start(self, model: Path) -> None:
        """Starts our servers with the model in this folder. They load it while the caller continues."""
        urls = self.settings.urls
        count = len(urls) or self.settings.servers
        for number in range(count):
            self._servers[number] = self._connect(number, urls[number]) if urls else self._started(number, model)

    def wait_until_ready(self, init_info: Mapping[str, Any] | None = None) -> None:
        """Waits for the servers that were started.

        init_info: what the servers' weight transfer is initialised with; None: weights are never transferred.
        UserError: one did not become ready. The others are not waited for.
        """
        self.init_info = init_info
        self.run(all_of(self._first_start(server) for server in self.live))

    def check(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> None:
        """UserError: a live server cannot sample the requests."""
        if self.longest is not None:
            check_requests(requests, sampling, vocab_size=self.vocab_size, max_model_len=self.longest)

    def sample(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParameters,
        *,
        version: str | None,
        wants_logprobs: bool,
        found: dict[int, Rollout],
    ) -> "Future[dict[int, Rollout]]":
        """Rollouts by the number of their request; some are missing only if no server is left.

        found: those that exist already; it gets the others as they are complete. version: of the weights that each
        token must be of; None: not checked.
        """
        return self.submit(self._sample(requests, sampling, found, version, wants_logprobs))

    async def _sample(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParameters,
        found: dict[int, Rollout],
        version: str | None,
        wants_logprobs: bool,
    ) -> dict[int, Rollout]:
        with work("sampling", total=len(requests), unit="responses", in_background=True) as shown:
            while self.live and (missing := {i: request for i, request in enumerate(requests) if i not in found}):
                servers = self.live
                parts = balanced(missing, len(servers), response=sampling.max_new_tokens)

                async def ask(server: Server, part: Sequence[int]) -> None:
                    slots = asyncio.Semaphore(self.settings.requests)

                    async def one(number: int) -> None:
                        async with slots:
                            found[number] = await self.generate(
                                server, requests[number], sampling, version=version, wants_logprobs=wants_logprobs
                            )
                        mark_progress()
                        shown.done = len(found)

                    async with server.client.watched():
                        await all_of(one(number) for number in part)

                await asyncio.gather(
                    *(
                        self._guarded(server, ask(server, part), "sampling")
                        for server, part in zip(servers, parts, strict=True)
                        if part
                    )
                )
        return found

    async def generate(self, server: Server, *asked: Any, version: str | None, wants_logprobs: bool) -> Rollout:
        """One response of a server, with the current adapter if there is one."""
        if self.adapter is None:
            return await server.client.generate(*asked, version=version, wants_logprobs=wants_logprobs)
        name = self.adapter.name
        return await server.client.generate(*asked, version=None, adapter=name, wants_logprobs=wants_logprobs)

    def load_adapter(self, adapter: Adapter) -> None:
        """Makes every live server sample with an adapter. The one before is not needed any more afterwards."""
        before = self.adapter
        self.adapter = adapter

        async def load(server: Server) -> None:
            await self._load_adapter(server)
            if before is not None:
                await server.client.call_text("/v1/unload_lora_adapter", json={"lora_name": before.name})
            await self._forget_prefixes(server)

        self.run(self._each(self.live, load, "loading an adapter"))

    def begin_update(self) -> None:
        """Waits until no server samples any more, and opens the update of all of them.

        A server that sleeps gets memory for its weights, and `finish_update` gives it that for keys and values.
        """

        async def begin(server: Server) -> None:
            if server.asleep:
                await self._wake(server, "weights")
            await server.client.call("POST", "/pause", params={"mode": "wait"})
            await server.client.call("POST", "/start_weight_update")

        self.run(self._each(self.live, begin, "beginning an update"))

    def send(self, update_info: Mapping[str, Any]) -> Future:
        """Starts one message of an update on all servers, and returns at once. The result is None."""

        async def send(server: Server) -> None:
            await server.client.call("POST", "/update_weights", json={"update_info": dict(update_info)})
            mark_progress()

        return self.submit(self._each(self.live, send, "updating weights"))

    def finish_update(self, version: str) -> None:
        """Closes the update. Afterwards every live server samples with the weights `version` and old keys are gone."""

        async def finish(server: Server) -> None:
            call = server.client.call
            await call("POST", "/finish_weight_update", json={"weight_version": version})
            if server.asleep:
                if (state := await self._wake(server, "kv_cache")) != "awake":
                    raise ServerError(f"it is {state} after it was woken up")
                server.asleep = False
            await self._forget_prefixes(server)
            if (held := await server.client.weight_version()) != version:
                raise ServerError(f"it holds weights {held} after an update to {version}")
            await call("POST", "/resume")

        self.run(self._each(self.live, finish, "finishing an update"))

    def sleep(self) -> None:
        """Makes the live servers free the GPU memory of their weights, keys and values (vLLM's level 2)."""

        async def sleep(server: Server) -> None:
            await server.client.call("POST", "/sleep", params={"level": 2, "mode": "wait"})
            server.asleep = True

        self.run(self._each(self.live, sleep, "going to sleep"))

    def call_all(self, act: Callable[[Server], Awaitable[None]]) -> None:
        """Does something with all live servers. ServerError: the first of them that failed; the rest is cancelled."""

        async def named(server: Server) -> None:
            try:
                await act(server)
            except ServerError as error:
                raise ServerError(f"{server.name}: {error}") from error

        self.run(all_of(named(server) for server in self.live))

    def fail(self, servers: Sequence[Server], reason: str) -> None:
        """Uses these servers no more until they are started again."""

        async def fail(server: Server) -> None:
            raise ServerError("its weights are not known")

        self.run(self._each([server for server in servers if server.failed is None], fail, reason))

    def call_each(self, act: Callable[[Server], Awaitable[None]], what: str) -> None:
        """Does something with every live server; one that fails is not used any more."""
        self.run(self._each(self.live, act, what))

    def restart_failed(self, model: Path, *, version: str | None) -> None:
        """Restarts our failed servers with the weights in this folder, until one is alive and none of ours has failed.

        Servers of `urls` that failed are never used again. UserError: no server is left, or ours failed more often than
        `rollout.vllm.restarts`.
        """
        while self.failed:
            reasons = "; ".join(f"{server.name}: {server.failed}" for server in self.failed)
            ours = [server for server in self.failed if server.process is not None]
            if len(ours) > self.restarts_left:
                limit = f"rollout.vllm.restarts={self.settings.restarts} allows no more restarts"
                raise UserError(f"{reasons}. {limit}; what the servers printed is in {self.logs}")
            if not (ours or self.live):
                raise UserError(f"{reasons}. No server of rollout.vllm.urls is left")
            self.restarts_left -= len(ours)
            for server in self.failed:
                done = "is left out" if server.process is None else "is started again"
                self.note(f"{server.name} {done}, because it failed: {server.failed}")
                self.run(server.client.close())
                del self._servers[server.number]
            fresh = [self._started(server.number, model) for server in ours]
            self._servers |= {server.number: server for server in fresh}
            self.run(self._each(fresh, self._make_ready))
            ready = [server for server in fresh if server.failed is None]
            if self.adapter is not None:
                self.run(self._each(ready, self._load_adapter, "loading an adapter"))
            elif version is not None:
                self.run(self._each(ready, lambda server: self._name_version(server, version)))

    def close(self) -> None:
        """Cancels all work, and ends the servers that this run started and the thread."""
        self.run(_cancel_all())
        for server in self._servers.values():
            if server.process is not None:
                server.process.kill()
            with suppress(Exception):
                self.run(server.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts work in the fleet's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in the fleet's loop."""
        return self.submit(work).result()

    def _connect(self, number: int, url: str) -> Server:
        return Server(number, Client(url, timeout=self.settings.hang_timeout_s), None)

    def _started(self, number: int, model: Path) -> Server:
        port = free_port(besides=self._ports)
        self._ports.add(port)
        process = ServerProcess(
            server_command(self.engine, model, port),
            server_environment(self.engine, number),
            self.logs / f"vllm_server_{number}.log",
            remove=self.engine.remove,
        )
        client = Client(f"http://127.0.0.1:{port}", timeout=self.settings.hang_timeout_s)
        return Server(number, client, process)

    async def _first_start(self, server: Server) -> None:
        """UserError: the server does not become ready; the message holds what it printed."""
        await self._guarded(server, self._make_ready(server), "starting")
        if server.failed is not None:
            hint = f". What it printed is in {server.process.log}" if server.process else ""
            raise UserError(f"{server.name} does not start: {server.failed}{hint}")

    async def _make_ready(self, server: Server) -> None:
        """ServerError: the server does not become ready. UserError: it was started with a wrong option."""
        end = time.monotonic() + self.settings.start_timeout_s
        while not await server.client.is_ready():
            server.check_process()
            if time.monotonic() > end:
                limit = f"rollout.vllm.start_timeout_s={self.settings.start_timeout_s:g}"
                raise ServerError(f"it did not answer within {limit} ({server.client.not_ready})")
            mark_progress()
            await asyncio.sleep(POLL_SECONDS)
        server.check_process()  # if it has ended, another server answers at its port
        if not server.longest:  # a server that sleeps was asked before
            server.longest = await server.client.max_model_len()
            await self._check_options(server)
        if self.init_info is not None:
            await server.client.call("POST", "/init_weight_transfer_engine", json={"init_info": dict(self.init_info)})

    async def _check_options(self, server: Server) -> None:
        """UserError: it samples nothing, counts no tokens, or reports other log-probabilities than the run needs."""
        if await server.client.is_paused():
            raise UserError(
                f"{server.name} is paused: another run updates it, or a run was killed while it updated it. Two runs "
                "cannot share a server; start it again"
            )
        if await server.client.tokens() is None:
            raise UserError(
                f"{server.name} does not count its tokens, which tell a busy server from one that hangs: start it "
                "without --disable-log-stats"
            )
        expected, found = self.engine.logprobs_mode, await logprobs_mode_of(server.client)
        if found not in (None, expected):
            fix = f"start it with --logprobs-mode {expected}"
            if server.process is not None:
                fix = "leave --logprobs-mode out of rollout.vllm.command and rollout.vllm.extra_args"
            raise UserError(f"{server.name} runs with --logprobs-mode {found}, and the run needs {expected}: {fix}")

    async def _load_adapter(self, server: Server) -> None:
        loaded = {"lora_name": self.adapter.name, "lora_path": str(self.adapter.folder)}
        await server.client.call_text("/v1/load_lora_adapter", json=loaded)

    async def _name_version(self, server: Server, version: str) -> None:
        await server.client.call("POST", "/update_weight_version", json={"new_version": version})

    async def _wake(self, server: Server, tag: str) -> str:
        """Gives a sleeping server memory for its `weights` or its `kv_cache`. Returns whether it is awake then."""
        return str(field_of(await server.client.call("POST", "/wake_up", params={"tags": tag}), "status"))

    async def _forget_prefixes(self, server: Server) -> None:
        """An update leaves the keys and values of old weights in the prefix cache; the next prompt would read them."""
        answer = await server.client.call("POST", "/reset_prefix_cache")
        if not answer.get("success"):
            raise ServerError("its prefix cache was not reset: requests still hold blocks")

    async def _each(
        self, servers: Sequence[Server], act: Callable[[Server], Awaitable[None]], what: str = "starting"
    ) -> None:
        await asyncio.gather(*(self._guarded(server, act(server), what) for server in servers))

    async def _guarded(self, server: Server, work: Awaitable[None], what: str) -> None:
        """Awaits work of one server. If it fails, the server is killed, because what it holds is not known."""
        try:
            await work
        except ServerError as error:
            server.failed = f"{what}: {error}"
            if server.process is not None:
                words = server.process.last_words() if not server.process.runs else ""
                server.failed += f" ({words})" if words and words not in server.failed else ""
                await asyncio.to_thread(server.process.kill)


async def _cancel_all() -> None:
    """Ends all other work of the loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(work: Sequence[Coroutine[Any, Any, None]] | Any) -> None:
    """Awaits all of it; after a failure the rest is cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
