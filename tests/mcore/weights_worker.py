"""Loads weights from Megatron checkpoints that are damaged, of another model, or of another program, on two ranks."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import ModelSettings
from megatron_paint.mcore.checkpoint import load_weights
from megatron_paint.mcore.hf_checkpoint import export_stage
from megatron_paint.mcore.model import build_model
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape

Change = Callable[[Path], None]


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def overwrite(name: str, at: int, content: bytes) -> Change:
    def change(folder: Path) -> None:
        old = bytearray((folder / name).read_bytes())
        old[at : at + len(content)] = content
        (folder / name).write_bytes(old)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


class Foreign:
    """A class that no other program knows."""


def foreign_common_part(folder: Path) -> None:
    """What another program keeps beside the weights: its arguments, in a pickle that torch.load refuses."""
    torch.save({"args": argparse.Namespace(vocab=Foreign()), "iteration": 5}, folder / "common.pt")


def nothing(folder: Path) -> None:
    pass


PIECES = "__0_0.distcp"
CHANGES: dict[str, Change] = {
    "metadata empty": cut(".metadata", 0),
    "metadata cut": cut(".metadata", 40),
    "metadata garbage": overwrite(".metadata", 100, b"\xff" * 64),
    "metadata missing": remove(".metadata"),
    "backend cut": cut("metadata.json", 40),
    "backend missing": remove("metadata.json"),
    "pieces empty": cut(PIECES, 0),
    "pieces cut": cut(PIECES, 5000),
    "pieces garbage": overwrite(PIECES, 0, b"\xff" * 64),
    "pieces zeros": overwrite(PIECES, 0, bytes(2000)),
    "pieces missing": remove(PIECES),
    "common part of another program": foreign_common_part,
    "common part missing": remove("common.pt"),
    "nothing": nothing,
}


def main() -> None:
    models, checkpoints, out = (Path(path) for path in sys.argv[1:4])
    torch.set_num_threads(1)
    megatron = MegatronSettings(tensor_model_parallel_size=2)
    ranks = start_ranks(megatron)
    source = models / "small"
    shape = read_shape(source)
    stage = build_model(shape, ModelSettings(hf_path=str(source), dtype="float32"), megatron, ranks)
    cases = [(name, "small", change) for name, change in CHANGES.items()]
    cases += [("another model", "wide", nothing), ("padded", "padded", nothing), ("fewer rows", "fewer", nothing)]
    told = {}
    for name, checkpoint, change in cases:
        folder = out / name.replace(" ", "-")
        if ranks.rank == 0:
            shutil.copytree(checkpoints / checkpoint, folder)
            change(folder)
        dist.barrier()
        for parameter in stage.parameters():
            parameter.data.fill_(7.0)
        try:
            told[name] = {"notes": load_weights(stage, folder, shape)}
            export_stage(stage, out / f"{folder.name}-hf", shape=shape, ranks=ranks, dtype=torch.float32, source=source)
        except UserError as error:
            told[name] = {"error": str(error)}
    (out / f"told{ranks.rank}.json").write_text(json.dumps(told))
    stop_ranks()


if __name__ == "__main__":
    main()
