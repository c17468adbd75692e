"""What vLLM's own weight transfer asks of a trainer: a source of tensors, and a client that reaches all servers.

vLLM is imported only here, and only if `rollout.vllm.transfer` is nccl or ipc.
"""

import logging
import os
import pickle
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_paint.base.errors import UserError
from megatron_paint.rollouts.vllm.client import ServerError, field_of
from megatron_paint.rollouts.vllm.fleet import Fleet, Server
from megatron_paint.rollouts.vllm.weights import DeviceWeights
from megatron_paint.runtime.heartbeat import mark_progress

if TYPE_CHECKING:
    from torch import Tensor


def import_vllm(transfer: str) -> ModuleType:
    """vLLM's module of weight transfers. UserError: it is not in the environment of the trainer.

    vLLM would write to the standard output, which is the run's own.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm.distributed.weight_transfer as found
    except ImportError as error:
        raise UserError(
            f"rollout.vllm.transfer={transfer} needs vLLM 0.32 or newer in the Python environment of the trainer too, "
            f"and it cannot be imported ({error}): install it there, or set transfer to file"
        ) from error
    logging.getLogger("vllm").setLevel(logging.WARNING)
    return found


class Stream:
    """One pass over all tensors in each update; every rank that takes part iterates together.

    A pass that breaks off is completed by `finish`: the other ranks gather with this one.
    """

    def __init__(self, weights: DeviceWeights, messages: Sequence[Sequence[str]]):
        self.weights, self.messages = weights, messages
        self.shapes = {name: tuple(shape) for name, shape in weights.shapes().items()}
        self.gathered = 0  # messages of this pass
        self.broken = threading.Event()  # nobody receives the rest

    def metadata(self) -> list[tuple[str, Any, tuple[int, ...]]]:
        """Name, type and shape of each tensor, in the order of the pass."""
        return [(name, self.weights.dtype, self.shapes[name]) for message in self.messages for name in message]

    def begin(self) -> None:
        self.gathered = 0
        self.broken.clear()

    def __iter__(self) -> Iterator[tuple[str, "Tensor"]]:
        self.gathered = 0
        while self.gathered < len(self.messages):
            tensors = self._next()
            for name, tensor in tensors.items():
                if self.broken.is_set():
                    raise ServerError("the servers do not receive the weights any more")
                yield name, tensor

    def finish(self) -> None:
        while self.gathered < len(self.messages):
            self._next()

    def _next(self) -> Mapping[str, "Tensor"]:
        number, self.gathered = self.gathered, self.gathered + 1
        tensors = self.weights.message(number)
        mark_progress()
        assert not tensors or list(tensors) == list(self.messages[number]), f"message {number} is not that of its plan"
        for name, tensor in tensors.items():
            assert tuple(tensor.shape) == self.shapes[name], f"{name} is {tuple(tensor.shape)}, not {self.shapes[name]}"
        return tensors


def source_of(stream: Stream, vllm: ModuleType) -> Any:
    """The stream as vLLM's `WeightSource`."""

    class Source(vllm.WeightSource):
        def metadata(self) -> list[Any]:
            return [vllm.ParamMeta(name, dtype, shape) for name, dtype, shape in stream.metadata()]

        def __iter__(self) -> Iterator[tuple[str, "Tensor"]]:
            return iter(stream)

    return Source()


class FleetClient:
    """Implements vLLM's `VLLMWeightSyncClient` for all servers of a fleet. Only rank 0 calls it.

    No call raises: a server that fails is killed, and the update continues with the others. Otherwise the ranks that
    wait for rank 0 would wait for ever.
    """

    def __init__(self, fleet: Fleet | None):
        self.fleet = fleet
        self.version = ""  # of the update that comes next; vLLM passes none

    @property
    def is_complete(self) -> bool:
        """Whether the client reaches all live servers as it is."""
        return True

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self.fleet.init_info = init_info  # also of servers that are started again
        self.fleet.call_each(lambda server: _init(server, init_info), "preparing the transfer of weights")

    def start_weight_update(self) -> None:
        self.fleet.begin_update()

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        self.fleet.send(in_json(update_info)).result()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.fleet.finish_update(weight_version or self.version)


class GroupClient(FleetClient):
    """The client for servers that are in one NCCL group with rank 0.

    They fail together: those that live wait for the dead one in NCCL. Calls raise ServerError then, and nobody waits in
    NCCL any more.
    """

    def __init__(self, fleet: Fleet | None, stream: Stream):
        super().__init__(fleet)
        self.stream = stream
        self._ending, self.ended = threading.Lock(), False
        self.members: list[Server] = []
        self.communicator: Any = None  # vLLM's, of rank 0
        self.sizes: list[int] = []  # workers of each member

    def find_members(self) -> None:
        """Lets the live servers leave the group before, and asks for their workers. ServerError: one did not answer."""
        self.members = list(self.fleet.live)
        found: dict[int, int] = {}

        async def ask(server: Server) -> None:
            await server.client.call("POST", "/shutdown_weight_transfer_engine")
            found[server.number] = int(field_of(await server.client.call("GET", "/get_world_size"), "world_size"))

        self._together(ask, "forming a group")
        self.sizes = [found[server.number] for server in self.members]

    @property
    def is_complete(self) -> bool:
        """Whether the live servers are the members of the group."""
        live = self.fleet.live
        return len(live) == len(self.members) and all(a is b for a, b in zip(live, self.members, strict=True))

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Each server's workers come after those of the servers before it."""
        first = init_info["rank_offset"]
        offsets = {server.number: first + sum(self.sizes[:place]) for place, server in enumerate(self.members)}
        self._together(
            lambda server: _init(server, {**init_info, "rank_offset": offsets[server.number]}), "joining the NCCL group"
        )

    def start_weight_update(self) -> None:
        super().start_weight_update()
        if not self.is_complete:
            reason = "; ".join(f"{server.name}: {server.failed}" for server in self.fleet.failed)
            self.give_up(reason)
            raise ServerError(reason)

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        body = {"update_info": dict(update_info)}

        async def send(server: Server) -> None:
            await server.client.call("POST", "/update_weights", json=body)
            mark_progress()

        self._together(send, "updating weights")

    def _together(self, act: Any, what: str) -> None:
        try:
            self.fleet.call_all(act)
        except ServerError as error:
            self.give_up(f"{what}: {error}")
            raise

    def give_up(self, reason: str) -> None:
        """Ends the group, once. The order matters: rank 0 sends nothing more, leaves NCCL, and the servers are killed.

        The thread that sends and the one that calls the servers may both come here. The second one waits for the first.
        """
        with self._ending:
            if self.ended:
                return
            self.ended = True
            self.stream.broken.set()
            if self.communicator is not None:
                self.communicator.destroy()
            self.fleet.fail(self.members, f"a server of its NCCL group failed ({reason})")


async def _init(server: Server, init_info: Mapping[str, Any]) -> None:
    await server.client.call("POST", "/init_weight_transfer_engine", json={"init_info": dict(init_info)})


def in_json(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """An update in JSON's types. Handles of CUDA memory are pickled, as vLLM's own HTTP client does it."""
    found = dict(update_info)
    if (handles := found.pop("ipc_handles", None)) is not None:
        found["ipc_handles_pickled"] = b64encode(pickle.dumps(handles)).decode("ascii")
    return found
