"""A run whose servers get faults at set steps: a target for `tests.support.forked_ranks`."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from megatron_paint.__main__ import run
from megatron_paint.rollouts.vllm.client import Client
from megatron_paint.rollouts.vllm.fleet import Fleet, Server
from megatron_paint.rollouts.vllm.sampler import VllmSampler

UNDER_WAY = 0.02  # seconds after which a request that was sent is being worked on, or done
SECOND = 2


class Faults:
    """What happens in which step: {step: [what, the number of the server]}. Each happens once.

    kill_sampling and stop_sampling: SIGKILL or SIGSTOP of the server's process group, after its first request of the
    step was sent and before the second one is.
    kill_updating: SIGKILL between start and finish of an update. truncate: a file of the update's first message is cut
    after it was written, and before servers read it.
    """

    def __init__(self, faults: dict[str, list]) -> None:
        self.faults = {int(step): (what, number) for step, (what, number) in faults.items()}
        self.step = 0
        self.requests = Counter[int]()  # of each server in this step, without the spot check

    def take(self, *kinds: str, number: int | None = None) -> tuple[str, int] | None:
        """The fault of this step, if it is of one of these kinds and of this server."""
        what, of = self.faults.get(self.step, (None, None))
        if what in kinds and number in (None, of):
            del self.faults[self.step]
            return what, of
        return None


def faulty() -> None:
    """Runs the command line. Its last argument is the faults, as JSON."""
    faults = Faults(json.loads(sys.argv.pop()))
    sync, start, generate, send = VllmSampler.sync_weights, Fleet.sample, Client.generate, Fleet.send
    fleets: list[Fleet] = []

    def sync_weights(self, step):
        faults.step = step
        fleets.clear()
        sync(self, step)

    def sample_all(self, *arguments, **options):
        fleets[:] = [self]
        faults.requests.clear()
        return start(self, *arguments, **options)

    async def sample(self, *arguments, **options):
        for server in [server for fleet in fleets for server in fleet.live if server.client is self]:
            faults.requests[server.number] += 1
            if faults.requests[server.number] == SECOND:
                await break_down(server)
        return await generate(self, *arguments, **options)

    async def break_down(server):
        if fault := faults.take("kill_sampling", "stop_sampling", number=server.number):
            await asyncio.sleep(UNDER_WAY)
            os.killpg(group_of(server), signal.SIGKILL if fault[0] == "kill_sampling" else signal.SIGSTOP)

    def send_message(self, update_info):
        if faults.take("truncate"):
            os.truncate(next(iter(update_info["files"])), 100)
        sent = send(self, update_info)
        if fault := faults.take("kill_updating"):
            os.killpg(group_of(next(server for server in self.live if server.number == fault[1])), signal.SIGKILL)
        return sent

    VllmSampler.sync_weights, Fleet.sample = sync_weights, sample_all
    Client.generate, Fleet.send = sample, send_message
    run()


def group_of(server: Server) -> int:
    """The process group of a server: that of the only child of its guard."""
    guard = server.process._process.pid
    (child,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    return os.getpgid(int(child))
