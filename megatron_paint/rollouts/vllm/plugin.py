"""Runs inside vLLM: the engine that takes the trainer's weights out of safetensors files.

vLLM finds `register` through the entry point group `vllm.general_plugins`, in each of its processes. So this package
must be installed in vLLM's environment too; it needs nothing of the trainer there.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_paint.rollouts.vllm.command import FILE_BACKEND

if TYPE_CHECKING:
    from torch import Tensor


def register() -> None:
    """Makes the engine known to this process of vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if FILE_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(FILE_BACKEND, __name__, "FileTransferEngine")


def __getattr__(name: str) -> Any:
    """The engine's class is made when vLLM asks for it: importing vLLM takes seconds."""
    if name != "FileTransferEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _engine_class()
    return globals()[name]


def _engine_class() -> type:
    from safetensors import safe_open
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        """tensors: how many tensors a complete update has. folder: the one through which they come."""

        tensors: int = 0
        folder: str = ""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """One message. files: path -> [bytes of the file, names of its tensors]."""

        files: dict[str, list] = field(default_factory=dict)

    class FileTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        """Loads each message through the model's own loader. A message holds complete modules."""

        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            if not os.path.isdir(init_info.folder):
                raise ValueError(
                    f"this server does not see {init_info.folder}: set rollout.vllm.transfer_folder to a folder that "
                    "the machines of the trainer and of the servers share"
                )
            self.tensors, self.names = init_info.tensors, set()

        def start_weight_update(self) -> None:
            self.names = set()
            initialize_layerwise_reload(self.model)
            # On a CPU vLLM packs the experts for its kernel when the kernel is made. It makes none if there is one, and
            # would copy weights that are not packed into packed storage.
            for layer in self.model.modules():
                method = getattr(layer, "quant_method", None)
                if self.device.type == "cpu" and getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None

        def receive_weights(self, update_info: UpdateInfo) -> None:
            for path, (size, names) in update_info.files.items():
                found = os.path.getsize(path)
                if found != size:
                    raise ValueError(f"{path} has {found} bytes, and {size} were written")
                with safe_open(path, "pt") as file:
                    if sorted(file.keys()) != sorted(names):
                        raise ValueError(f"{path} does not hold the tensors that were announced")
                    self.model.load_weights(self._tensors(file, names))

        def _tensors(self, file: Any, names: list[str]) -> "Iterator[tuple[str, Tensor]]":
            for name in names:
                if name in self.names:
                    raise ValueError(f"{name} came twice in one update")
                self.names.add(name)
                # A copy: vLLM keeps the tensors of an incomplete layer, and the file is written again before that.
                yield name, file.get_tensor(name).clone()

        def finish_weight_update(self) -> None:
            if len(self.names) != self.tensors:
                raise ValueError(f"the update had {len(self.names)} tensors of {self.tensors}")
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """Holds nothing that must be given back."""

    return FileTransferEngine
