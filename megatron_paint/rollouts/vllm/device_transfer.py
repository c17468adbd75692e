"""Weights from GPU to GPU, by vLLM's own trainer-side engines `nccl` and `ipc`.

Not measured, and not run on a GPU: what both sides say to each other is tested, the copies between GPUs are not.
"""

import math
import socket
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_paint.base.errors import UserError
from megatron_paint.rollouts.vllm.client import ServerError
from megatron_paint.rollouts.vllm.file_transfer import Everyone
from megatron_paint.rollouts.vllm.fleet import Fleet
from megatron_paint.rollouts.vllm.process import free_port
from megatron_paint.rollouts.vllm.trainer_side import FleetClient, GroupClient, Stream, import_vllm, source_of
from megatron_paint.rollouts.vllm.weights import DeviceWeights
from megatron_paint.runtime.rank_zero import OnRankZero


class DeviceTransfer:
    """Sends the weights of a `DeviceWeights`. Every rank has one; only that of rank 0 has the fleet's client.

    nccl: rank 0 broadcasts to all workers of all servers. Its group is made before the first update, and again after
    servers were started again. ipc: each worker reads the memory of the rank on its own GPU.
    """

    init_info = None  # the client sends it

    def __init__(
        self,
        weights: DeviceWeights,
        *,
        transfer: Literal["nccl", "ipc"],
        rank: int,
        message_bytes: int,
        on_rank_zero: OnRankZero,
        everyone: Everyone,
    ):
        """message_bytes: size of the buffers, unless a tensor is larger. UserError: vLLM cannot be imported."""
        self.weights, self.transfer, self.rank = weights, transfer, rank
        self.on_rank_zero, self.everyone = on_rank_zero, everyone
        self.shares_gpus = transfer == "ipc"
        everyone(self._import)
        self.stream = Stream(weights, weights.plan(message_bytes))
        planned = sorted(name for name, *_ in self.stream.metadata())
        assert planned == sorted(self.stream.shapes), "the messages do not hold each tensor of the model once"
        largest = max(math.prod(shape) for shape in self.stream.shapes.values()) * weights.dtype.itemsize
        self.buffer_bytes = max(message_bytes, largest)
        self.client: FleetClient | None = None
        self.engine: Any = None

    def send(self, fleet: Fleet | None, version: str) -> None:
        """One update of all live servers, complete for each server that is live afterwards. All ranks call together.

        fleet: None on all ranks but 0. UserError: a weight is not finite, or rank 0 cannot open its side.
        """
        self.everyone(self.weights.check_finite)
        self.stream.begin()
        if self.on_rank_zero(lambda: self._is_open(fleet)) or self._connect(fleet):
            self.everyone(lambda: self._send(version))

    def close(self) -> None:
        """Leaves the group."""
        if self.engine is not None:
            self.engine.shutdown()

    def _import(self) -> None:
        self.vllm = import_vllm(self.transfer)

    def _is_open(self, fleet: Fleet) -> bool:
        return self.client is not None and self.client.is_complete

    def _connect(self, fleet: Fleet | None) -> bool:
        """Makes both sides ready. Returns False if servers failed: no server is live then."""
        group = self.on_rank_zero(lambda: self._prepare(fleet))
        return group is not None and all(self.everyone(lambda: self._open(group)))

    def _prepare(self, fleet: Fleet) -> dict[str, Any] | None:
        """On rank 0: the client, and where the group meets; None if servers failed."""
        if self.shares_gpus:
            self.client = FleetClient(fleet)
            return {}
        self.close()
        self.client = client = GroupClient(fleet, self.stream)
        try:
            client.find_members()
        except ServerError:
            return None
        address = address_for(fleet.settings.urls)
        return {"master_address": address, "master_port": free_port(address), "world_size": 1 + sum(client.sizes)}

    def _open(self, group: dict[str, Any]) -> bool:
        """This rank's side. False: servers failed."""
        if self.rank > 0:
            self.client = FleetClient(None)
        try:
            self.engine = self.vllm.WeightTransferTrainerFactory.trainer_init(
                self._init_info(group), client=self.client, source=source_of(self.stream, self.vllm)
            )
        except ServerError:
            return False
        except (RuntimeError, OSError) as error:
            if self.stream.broken.is_set():  # rank 0 waited for a server that had failed
                return False
            raise UserError(
                f"rollout.vllm.transfer={self.transfer} cannot begin on rank {self.rank}: {error}"
            ) from error
        if isinstance(self.client, GroupClient):
            self.client.communicator = self.engine.model_update_group
        return True

    def _init_info(self, group: dict[str, Any]) -> Any:
        packed = {"packed": True, "packed_buffer_size_bytes": self.buffer_bytes}
        if self.shares_gpus:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=self.rank, **packed)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(rank=self.rank, **group, **packed)

    def _send(self, version: str) -> None:
        """This rank's part of an update. Every rank gathers every message, also after servers have failed."""
        self.client.version = version
        try:
            self.engine.send_weights()
        except ServerError as error:  # of a call to the servers, perhaps in another thread
            if isinstance(self.client, GroupClient):
                self.client.give_up(str(error))
        except (RuntimeError, OSError, ValueError) as error:
            if not isinstance(self.client, GroupClient):
                raise
            self.client.give_up(f"sending weights failed on rank 0: {error}")
        self.stream.finish()


def address_for(urls: Sequence[str]) -> str:
    """The address of this machine for servers at `urls`, or for those of this machine if there are none.

    UserError: the name of a server is not known.
    """
    found = "127.0.0.1"
    for url in urls:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((urlsplit(url).hostname, urlsplit(url).port or 80))  # sends nothing
                own = probe.getsockname()[0]
        except OSError as error:
            raise UserError(f"rollout.vllm.urls: {url} cannot be reached from this machine ({error})") from error
        found = found if own.startswith("127.") else own
    return found
