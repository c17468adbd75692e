"""What a trainer uses of vLLM 0.32's weight transfer, under the same names, on CPUs.

TCP takes the place of NCCL, and files that of CUDA's shared memory. `tests/rollouts/test_vllm_trainer_side.py` compares
the names with those of vLLM itself.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from tests.support.tcp_group import TcpGroup

WEIGHT_TRANSFER = "vllm.distributed.weight_transfer"
PACKED_BYTES, PACKED_BUFFERS = 1024**3, 2  # vLLM's defaults
LIMIT = 20.0  # seconds to wait for the servers; vLLM waits 300


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(ABC):
    @abstractmethod
    def metadata(self) -> list[ParamMeta]: ...

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


@dataclass
class NCCLTrainerInitInfo:
    backend: ClassVar[str] = "nccl"

    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int = PACKED_BYTES
    packed_num_buffers: int = PACKED_BUFFERS
    rank: int = field(kw_only=True)


@dataclass
class IPCTrainerInitInfo:
    backend: ClassVar[str] = "ipc"

    packed: bool = False
    packed_buffer_size_bytes: int = PACKED_BYTES
    rank: int = field(kw_only=True)


class Engine:
    """Both engines: vLLM's order of calls and of collectives."""

    def __init__(self, info: Any, client: Any, source: WeightSource) -> None:
        self.info, self.client, self.source, self.is_sender = info, client, source, info.rank == 0

    def chunks(self, *, over: bool) -> Iterator[tuple[list[ParamMeta], bytes]]:
        """What is packed together. over: a chunk ends after the tensor that exceeds the buffer, not before it."""
        limit, packed, content = self.info.packed_buffer_size_bytes, [], b""
        for name, tensor in self.source:
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if not over and len(raw) > limit:
                raise ValueError(f"Tensor '{name}' exceeds buffer_size_bytes={limit}.")
            if not over and content and len(content) + len(raw) > limit:
                yield packed, content
                packed, content = [], b""
            packed.append(ParamMeta(name, tensor.dtype, tuple(tensor.shape)))
            content += raw
            if over and len(content) > limit:
                yield packed, content
                packed, content = [], b""
        if packed:
            yield packed, content


class NCCLTrainerWeightTransferEngine(Engine):
    model_update_group: TcpGroup | None = None

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: WeightSource | None = None):
        engine = cls(init_info, client, source)
        if not engine.is_sender:
            return engine
        place = {name: getattr(init_info, name) for name in ("master_address", "master_port", "world_size")}
        packing = {
            name: getattr(init_info, name) for name in ("packed", "packed_buffer_size_bytes", "packed_num_buffers")
        }
        with ThreadPoolExecutor(max_workers=1) as executor:
            joined = executor.submit(client.init_weight_transfer_engine, {**place, "rank_offset": 1, **packing})
            engine.model_update_group = TcpGroup(
                init_info.master_address, init_info.master_port, 0, init_info.world_size, limit=LIMIT
            )
            joined.result()
        return engine

    def send_weights(self) -> None:
        meta = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        executor = ThreadPoolExecutor(max_workers=1)
        try:
            received = executor.submit(self.client.update_weights, described(meta))
            if received.done():
                received.result()
            assert self.model_update_group is not None
            seen = []
            for packed, content in self.chunks(over=True):
                seen += packed
                self.model_update_group.send(content)
            if seen != meta:
                raise ValueError("WeightSource metadata() disagrees with iteration")
            received.result()
        finally:
            executor.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        if self.model_update_group is not None:
            self.model_update_group.destroy()
            self.model_update_group = None


class IPCTrainerWeightTransferEngine(Engine):
    folder: ClassVar[Path]  # of the "memory" that ranks share with servers

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: WeightSource | None = None):
        engine = cls(init_info, client, source)
        if engine.is_sender:
            client.init_weight_transfer_engine({"packed": init_info.packed})
        return engine

    def send_weights(self) -> None:
        if self.is_sender:
            self.client.start_weight_update()
        buffer = self.folder / f"gpu{self.info.rank}"
        for packed, content in self.chunks(over=False):
            buffer.write_bytes(content)
            handles = gathered({f"GPU-{self.info.rank}": (str(buffer), len(content))})
            if self.is_sender:
                sizes = [meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in packed]
                self.client.update_weights({**described(packed), "ipc_handles": handles, "tensor_sizes": sizes})
            wait_for_all()
        if self.is_sender:
            self.client.finish_weight_update()
        wait_for_all()

    def shutdown(self) -> None: ...


class WeightTransferTrainerFactory:
    _registry: ClassVar = {"nccl": NCCLTrainerWeightTransferEngine, "ipc": IPCTrainerWeightTransferEngine}

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: WeightSource | None = None) -> Engine:
        return cls._registry[init_info.backend].trainer_init(init_info=init_info, client=client, source=source)


@dataclass
class UpdateInfo:
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


def described(meta: list[ParamMeta]) -> dict[str, Any]:
    names = [str(one.dtype).removeprefix("torch.") for one in meta]
    return asdict(UpdateInfo([one.name for one in meta], names, [list(one.shape) for one in meta]))


def gathered(handles: dict[str, tuple]) -> dict[str, tuple]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return handles
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, handles)
    return {uuid: handle for one in everyone for uuid, handle in one.items()}


def wait_for_all() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def modules(folder: Path) -> dict[str, ModuleType]:
    """The modules by their names in `sys.modules`. folder: for what ranks and servers share in the place of memory."""
    IPCTrainerWeightTransferEngine.folder = folder
    content = {
        "vllm": (),
        "vllm.distributed": (),
        WEIGHT_TRANSFER: (ParamMeta, WeightSource, WeightTransferTrainerFactory),
        f"{WEIGHT_TRANSFER}.nccl_engine": (NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine),
        f"{WEIGHT_TRANSFER}.ipc_engine": (IPCTrainerInitInfo, IPCTrainerWeightTransferEngine),
    }
    made = {name: ModuleType(name) for name in content}
    for name, members in content.items():
        for member in members:
            setattr(made[name], member.__name__, member)
        above, _, last = name.rpartition(".")
        if above:
            setattr(made[above], last, made[name])
    return made


def install(folder: Path) -> None:
    """Takes the place of vLLM in this process."""
    sys.modules.update(modules(folder))
