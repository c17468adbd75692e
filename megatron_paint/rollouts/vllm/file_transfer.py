"""Weights through files: every writing rank fills a message, and all servers read it."""

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.dtypes import raw_bytes
from megatron_paint.checkpoints.hf_writer import lay_out, write_at
from megatron_paint.rollouts.vllm.fleet import Fleet
from megatron_paint.rollouts.vllm.weights import WeightSource
from megatron_paint.runtime.files import disk_errors
from megatron_paint.runtime.rank_zero import OnRankZero

if TYPE_CHECKING:
    from torch import Tensor

SLOTS = 2  # while servers read one message, ranks write the next one

Everyone = Callable[[Callable[[], Any]], list[Any]]  # runs a function on all ranks; returns all results, by rank


@dataclass(frozen=True, kw_only=True)
class Written:
    """A message of one rank, in its file."""

    rank: int
    path: str
    size: int  # bytes of the file
    names: tuple[str, ...]


@dataclass
class Sending:
    """The message that the servers read now."""

    message: Future | None = None
    files: list[str] = field(default_factory=list)


class FileTransfer:
    """Sends the weights of a `WeightSource` to all servers of the fleet, which only rank 0 has.

    A folder in memory keeps its files: memory that is written again costs half the time of new memory. On a shared
    folder every message has a new name, because another machine may still hold the old content under the old name.
    """

    shares_gpus = False

    def __init__(
        self,
        weights: WeightSource,
        *,
        rank: int,
        message_bytes: int,
        folder: Path,
        in_memory: bool,
        on_rank_zero: OnRankZero,
        everyone: Everyone,
    ):
        """folder: of this run alone; all ranks that write and all servers must see it. UserError: it is refused."""
        self.weights, self.rank, self.folder, self.in_memory = weights, rank, folder, in_memory
        self.on_rank_zero, self.everyone = on_rank_zero, everyone
        self.shapes = {name: tuple(shape) for name, shape in weights.shapes().items()}
        self.plan = weights.plan(message_bytes)
        plans = everyone(lambda: self.plan)
        self.messages = max(map(len, plans))
        planned = sorted(name for plan in plans for message in plan for name in message)
        assert planned == sorted(self.shapes), "the messages do not hold each tensor of the model once"
        on_rank_zero(self.make_folder)

    def make_folder(self) -> None:
        """An empty folder. What a run that was killed has left there is removed."""
        with disk_errors(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, mode=0o700)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def init_info(self) -> dict[str, Any]:
        """What a server's engine must know before its first update."""
        return {"tensors": len(self.shapes), "folder": str(self.folder)}

    def send(self, fleet: Fleet | None, version: str) -> None:
        """One update of all live servers, complete for each server that is live afterwards. All ranks call together.

        fleet: None on all ranks but 0. UserError: the folder refuses a file, or a weight is not finite.
        """
        on_rank_zero, sending = self.on_rank_zero, Sending()
        self.everyone(self.weights.check_finite)
        on_rank_zero(lambda: fleet.begin_update())
        for number in range(self.messages):
            written = self.everyone(lambda number=number: self._write(number, version))
            files = [message for message in written if message is not None]
            if not on_rank_zero(lambda files=files: self._send(fleet, files, sending)):
                return
        on_rank_zero(lambda: self._finish(fleet, version, sending))

    def _write(self, number: int, version: str) -> Written | None:
        """Writes this rank's message of a round; None if another rank writes it."""
        tensors = self.weights.message(number)
        names = self.plan[number] if number < len(self.plan) else []
        assert sorted(tensors) == sorted(names), f"message {number} does not hold the tensors of its plan"
        for name, tensor in tensors.items():
            assert tuple(tensor.shape) == self.shapes[name], f"{name} is {tuple(tensor.shape)}, not {self.shapes[name]}"
        if not tensors:
            return None
        kept = f"slot{number % SLOTS}" if self.in_memory else f"{version.replace('/', '-')}-{number:05d}"
        path = self.folder / f"rank{self.rank:05d}-{kept}.safetensors"
        try:
            with disk_errors(path):
                self.folder.mkdir(parents=True, exist_ok=True)  # on the machine of this rank
                size = write_message(path, tensors)
        except UserError as error:
            raise UserError(f"{error}. rollout.vllm.transfer_folder chooses another folder for the weights") from error
        return Written(rank=self.rank, path=str(path), size=size, names=tuple(tensors))

    def _send(self, fleet: Fleet, files: list[Written], sending: "Sending") -> bool:
        """Starts the message of a round after the previous one was read. False: no server is left."""
        for message in files:
            if not os.path.exists(message.path) or os.path.getsize(message.path) != message.size:
                raise UserError(
                    f"rank 0 does not see {message.path} as rank {message.rank} has written it: set "
                    "rollout.vllm.transfer_folder to a folder that all machines of the run and of the servers share"
                )
        self._wait(sending)
        if fleet.live:
            sending.files = [message.path for message in files]
            sending.message = fleet.send({"files": {one.path: [one.size, list(one.names)] for one in files}})
        return bool(fleet.live)

    def _finish(self, fleet: Fleet, version: str, sending: "Sending") -> None:
        self._wait(sending)
        fleet.finish_update(version)

    def _wait(self, sending: "Sending") -> None:
        """Waits until the servers have read the message that is under way."""
        if sending.message is not None:
            sending.message.result()
        for file in () if self.in_memory else sending.files:
            Path(file).unlink(missing_ok=True)
        sending.message, sending.files = None, []


def write_message(path: Path, tensors: "Mapping[str, Tensor]") -> int:
    """Writes a safetensors file over what the path holds, and returns its size in bytes."""
    layout = lay_out({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, shard_bytes=2**62)
    ((file, header),) = layout.headers.items()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, layout.sizes[file])
        write_at(descriptor, memoryview(header), 0)
        for name, tensor in tensors.items():
            write_at(descriptor, raw_bytes(tensor), layout.places[name].start)
    finally:
        os.close(descriptor)
    return layout.sizes[file]
