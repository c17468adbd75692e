"""Runs in vLLM's environment: what its trainer side is like, and updates by it without GPUs.

FOLDER PYTHON MODEL...: writes FOLDER/api.json; then updates stand-ins, which PYTHON runs, by `nccl` and by `ipc`. TCP
takes the place of NCCL, and a mapped file that of the memory of a GPU. The rest of vLLM is its own.
"""

import dataclasses
import inspect
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm.distributed.weight_transfer as weight_transfer
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine, packed_tensor
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.rl.online.api_router import router as updates
from vllm.entrypoints.serve.dev.sleep.api_router import router as sleeping
from vllm.utils.argparse_utils import FlexibleArgumentParser

from megatron_paint.config.vllm import VllmSettings
from megatron_paint.rollouts.vllm.command import ServerOptions, server_command
from tests.support.device_updates import Run
from tests.support.tcp_group import TcpGroup


class Communicator(TcpGroup):
    """In the place of `PyNcclCommunicator`."""

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert src == 0
        assert tensor.dtype == torch.uint8
        self.send(tensor.numpy().tobytes())


class Stream:
    def synchronize(self) -> None:
        """A CPU has done what it was asked."""


def api() -> dict[str, Any]:
    """The names and signatures of vLLM that the trainer and the fake vLLM of the tests use."""

    def fields(cls: type) -> dict[str, Any]:
        return {
            field.name: None if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(cls)
        }

    def parameters(function: Any) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]

    client = weight_transfer.VLLMWeightSyncClient
    return {
        "fields": {
            cls.__name__: fields(cls)
            for cls in (weight_transfer.ParamMeta, nccl_engine.NCCLTrainerInitInfo, ipc_engine.IPCTrainerInitInfo)
        },
        "worker": fields(nccl_engine.NCCLWeightTransferInitInfo),
        "updates": {
            cls.__name__: fields(cls)
            for cls in (nccl_engine.NCCLWeightTransferUpdateInfo, ipc_engine.IPCWeightTransferUpdateInfo)
        },
        "abstract": sorted(weight_transfer.WeightSource.__abstractmethods__),
        "client": {
            name: parameters(method)
            for name, method in vars(client).items()
            if inspect.isfunction(method) and not name.startswith("_")
        },
        "trainer_init": parameters(weight_transfer.WeightTransferTrainerFactory.trainer_init),
        "trainers": sorted(weight_transfer.WeightTransferTrainerFactory._registry),
        "workers": sorted(weight_transfer.WeightTransferEngineFactory._registry),
        "routes": sorted(route.path for router in (updates, sleeping) for route in router.routes),
        "commands": {transfer: parsed(transfer) for transfer in ("file", "nccl", "ipc")},
    }


def parsed(transfer: str) -> list[Any]:
    """What vLLM makes of the command of a server: the backend, and whether it can sleep."""
    engine = ServerOptions(
        settings=VllmSettings(), dtype="float32", logprobs_mode="raw_logprobs", on_gpus=False, transfer=transfer
    )
    command = server_command(engine, Path("model"), 8000)
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    return [found.weight_transfer_config.backend, found.enable_sleep_mode]


def without_gpus(folder: Path) -> None:
    """Replaces what needs CUDA."""
    empty, memory = torch.empty, folder / "memory"

    def mapped(*size: Any, device: Any = None, **how: Any) -> torch.Tensor:
        if device != "cuda":
            return empty(*size, device=device, **how)
        return torch.from_file(str(memory), shared=True, size=size[0], **how)

    def open_endpoint(info: Any) -> Communicator:
        return Communicator(info.master_address, info.master_port, 0, info.world_size)

    nccl_engine.open_trainer_endpoint = open_endpoint
    packed_tensor._get_streams = lambda device, count: tuple(Stream() for _ in range(count))
    packed_tensor.reduce_tensor = lambda buffer: (None, (str(memory), buffer.numel()))
    torch.empty = mapped
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="GPU-0")
    torch.cuda.stream = lambda stream: nullcontext()
    torch.cuda.current_stream = Stream
    torch.cuda.ipc_collect = lambda: None


def main() -> None:
    folder, python, *models = sys.argv[1:]
    folder = Path(folder)
    (folder / "api.json").write_text(json.dumps(api()))
    without_gpus(folder)
    leaves = {"path": "/update_weights", "count": 2, "do": "leave"}
    for name, transfer, fault in (("nccl", "nccl", None), ("ipc", "ipc", None), ("failure", "nccl", leaves)):
        (folder / name).mkdir()
        run = Run(transfer, [Path(model) for model in models], folder / name, python=python, fault=fault)
        try:
            if transfer == "ipc":
                run.fleet.sleep()
            for number in range(1, len(models)):
                run.update(number)
                run.sampler.release_memory()
        finally:
            run.close()
        print(f"{name}: {len(models) - 1} updates, {len(run.notes)} restarts", flush=True)


if __name__ == "__main__":
    main()
