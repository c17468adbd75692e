"""Weights of a Hugging Face folder in memory as messages to an engine, without a trainer."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FUSED = re.compile(r"\.(?:[qkv]_proj|gate_proj|up_proj|experts\..*)(?:\.weight)?$|\.mlp\.experts\..*$")


class FolderWeights:
    """Implements `rollouts.vllm.weights.WeightSource` with one rank, and `DeviceWeights` if nothing is tied."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        self.tied = tied
        self.freed = 0  # how often memory was asked for
        self.take(folder)

    def take(self, folder: Path) -> None:
        """The weights from now on."""
        self.folder = folder
        self.tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        if self.tied:
            self.tensors["lm_head.weight"] = self.tensors["model.embed_tokens.weight"]

    def plan(self, message_bytes: int) -> list[list[str]]:
        modules: dict[str, list[str]] = {}
        for name in sorted(self.tensors, reverse=True):
            kind = "attention" if re.search(r"[qkv]_proj", name) else "mlp"
            modules.setdefault(FUSED.sub(f".{kind}", name), []).append(name)
        self.messages: list[list[str]] = []
        filled = 0
        for names in modules.values():
            size = sum(self.tensors[name].nbytes for name in names)
            if not self.messages or filled + size > message_bytes:
                self.messages.append([])
                filled = 0
            self.messages[-1] += names
            filled += size
        return self.messages

    def message(self, number: int) -> dict[str, torch.Tensor]:
        if number >= len(self.messages):
            return {}
        return {name: self.tensors[name] for name in self.messages[number]}

    def check_finite(self) -> None:
        assert all(tensor.isfinite().all() for tensor in self.tensors.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        (dtype,) = {tensor.dtype for tensor in self.tensors.values()}
        return dtype

    def free_memory(self) -> None:
        """There is none to free."""
        self.freed += 1

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "config.json", folder)
        save_file(self.tensors, folder / "model.safetensors")
