"""The GPUs that a run is planned for: figures of data sheets in machines.yaml, or a file of the user."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_paint.base.argument_parser import did_you_mean
from megatron_paint.base.errors import UserError
from megatron_paint.config.dialect import Count, Flag, Positive, Text, setting, settings_class

FILE = Path(__file__).with_name("machines.yaml")


@settings_class
class Gpu:
    """A kind of GPU and the links between GPUs. Rates are those of one GPU in one direction, at their peak."""

    memory: Annotated[Positive, setting("memory of a GPU in bytes")]
    bf16: Annotated[Positive, setting("FLOP/s of dense matrix products in bfloat16")]
    fp8: Annotated[Positive | None, setting("FLOP/s of dense matrix products in FP8; null: none")]
    hbm: Annotated[Positive, setting("bytes/s of the GPU's memory")]
    nvlink: Annotated[Positive, setting("bytes/s to the GPUs of the same node")]
    network: Annotated[Positive, setting("bytes/s to the GPUs of other nodes")]
    host: Annotated[Positive, setting("bytes/s to host memory")]
    host_memory: Annotated[Positive, setting("bytes/s of the memory of a node, divided by its GPUs")]
    gpus_per_node: Annotated[Count, setting("GPUs of a node")]
    source: Annotated[Text, setting("where the figures come from")]
    mxfp8: Annotated[Flag, setting("whether it computes MXFP8: compute capability 10.0 or higher")] = False


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs of a plan."""

    name: str
    gpu: Gpu
    gpus: int

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.gpus // self.gpu.gpus_per_node)

    @property
    def gpus_on_node(self) -> int:
        """GPUs of each node that are used."""
        return min(self.gpus, self.gpu.gpus_per_node)


def find_machine(name: str, *, gpus: int) -> Machine:
    """The machine of a known name or of a YAML file. UserError: unknown, wrong figures, or GPUs that fill no nodes."""
    if gpus < 1:
        raise UserError(f"--gpus={gpus}: give the number of GPUs, 1 or more")
    gpu = known_gpus()[name] if name in known_gpus() else _from_file(name)
    node = gpu.gpus_per_node
    if node % gpus and gpus % node:
        below = [size for size in range(1, node) if node % size == 0]
        valid = [*below, *(node * count for count in (max(1, gpus // node), gpus // node + 1))]
        nearest = min(valid, key=lambda size: (abs(size - gpus), -size))
        raise UserError(
            f"--gpus={gpus} fills neither nodes of {node} GPUs nor an even part of one: give a multiple of {node}, or "
            f"one of {', '.join(map(str, below)) or node} (nearest: {nearest})"
        )
    return Machine(name=name if name in known_gpus() else Path(name).stem, gpu=gpu, gpus=gpus)


@cache
def known_gpus() -> dict[str, Gpu]:
    """The GPUs that the package knows, by name."""
    return TypeAdapter(dict[str, Gpu]).validate_python(YAML(typ="safe").load(FILE.read_text(encoding="utf-8")))


def _from_file(name: str) -> Gpu:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        longer = [known for known in known_gpus() if known.startswith(name.lower())]
        near = f"did you mean {longer[0]}? " if longer else f"{did_you_mean(name, known_gpus())} ".lstrip()
        raise UserError(
            f"--gpu={name!r} is unknown: {near}known are {', '.join(known_gpus())}; a YAML file describes another one "
            "(see --gpu-list)"
        )
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and len(content) == 1 and isinstance(next(iter(content.values())), dict):
            content = next(iter(content.values()))
        return TypeAdapter(Gpu).validate_python(content)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"--gpu={name}: the file cannot be read ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"--gpu={name}: {key}: {first['msg']}; an entry needs memory, bf16, fp8, hbm, nvlink, network, host, "
            "host_memory, gpus_per_node and source (--gpu-list prints the known ones)"
        ) from None
