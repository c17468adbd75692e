"""vLLM servers of a plan: the settings that name them, and what the user must start beside the ranks."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_paint.base.counts import count_text
from megatron_paint.config.settings import Settings
from megatron_paint.config.vllm import OF_OWN_SERVERS
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.search.candidate import Candidate
from megatron_paint.planning.search.layer_time import LayerTime
from megatron_paint.planning.search.machines import Gpu
from megatron_paint.planning.search.rollout_time import server_layout

PLACED = ("urls", *OF_OWN_SERVERS)  # a file with one of these settings says itself where the servers are
ADDRESS, FOLDER = "http://SERVER{}:8000", "/SHARED/weights"  # made up


def sampled_by_servers(settings: Settings) -> bool:
    """Whether vLLM servers sample the responses of these settings."""
    return settings.rollout.engine == "vllm" and settings.needs.samples_per_problem > 0


def servers_of(shape: ModelShape, gpu: Gpu, *, gpus: int) -> tuple[int, int]:
    """GPUs of a server, and the number of servers. UserError: so many GPUs hold no server."""
    layout, count = server_layout(LayerTime(shape=shape, gpu=gpu, layout=Candidate()), gpus=gpus)
    return layout.tp, count


def with_addresses(tree: Mapping[str, Any], *, count: int) -> dict[str, Any]:
    """The settings with made-up addresses of the servers and a folder for weights, unless they place servers."""
    found = copy.deepcopy(dict(tree))
    given = found["rollout"].get("vllm") or {}
    transfer = given.get("transfer", "file")
    if transfer == "ipc" or any(name in given for name in PLACED):
        return found
    folder = {"transfer_folder": FOLDER} if transfer == "file" else {}
    urls = [ADDRESS.format(number) for number in range(1, count + 1)]
    found["rollout"]["vllm"] = {**folder, **given, "urls": urls}
    return found


def server_lines(settings: Settings, shape: ModelShape, gpu: Gpu, *, gpus: int) -> Iterator[str]:
    """What must run beside the ranks, for the console; nothing if the ranks sample."""
    if not sampled_by_servers(settings):
        return
    size, count = servers_of(shape, gpu, gpus=gpus)
    gpus_text = count_text(count * size, "GPU")
    planned = f"servers    {count} of vLLM with --tensor-parallel-size {size}, on {gpus_text} that no rank has"
    urls = settings.rollout.vllm.urls
    if not urls:
        yield f"{planned}, are planned; rollout.vllm says which ones the run starts"
        return
    yield f"{planned}: start them on other nodes, because the run does not (docs/vllm.md)"
    if ADDRESS.format(1) in urls:
        yield f"           replace {ADDRESS.format(1)} and so on by their addresses (rollout.vllm.urls)"
    if settings.rollout.vllm.transfer_folder == FOLDER:
        yield f"           replace {FOLDER} by a folder that ranks and servers see (rollout.vllm.transfer_folder)"
