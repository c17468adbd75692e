"""Settings of vLLM as a rollout engine that contradict each other; `contradictions.py` has the rest."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_paint.base.counts import count_text
from megatron_paint.config.settings import ModelSettings, RolloutSettings, RunSettings
from megatron_paint.config.vllm import COLDEST, OF_OWN_SERVERS, VllmSettings


def of_lora_transfer(rollout: RolloutSettings, model: ModelSettings) -> Iterator[str]:
    if rollout.lora_transfer == "merged":
        return
    if rollout.engine != "vllm":
        yield (
            f"rollout.lora_transfer belongs to engine=vllm, but rollout.engine={rollout.engine}; leave lora_transfer "
            "out, or set engine to vllm"
        )
    if model.lora is None:
        yield "rollout.lora_transfer=adapter sends the adapters of model.lora, which is not set: leave one of them out"
    elif model.lora.experts:
        yield (
            "rollout.lora_transfer=adapter sends adapters as PEFT stores them, and it was not tested that vLLM reads "
            "those of experts (model.lora.experts): set it to merged"
        )
    if model.megatron_path is not None:
        yield (
            "rollout.lora_transfer=adapter sends no weights, and the servers would sample from model.hf_path and not "
            "from model.megatron_path: set it to merged, or convert the checkpoint and name that folder as hf_path"
        )


def of_vllm(rollout: RolloutSettings) -> Iterator[str]:
    vllm = rollout.vllm
    if rollout.engine != "vllm":
        if vllm != VllmSettings():
            yield (
                f"the section rollout.vllm belongs to engine=vllm, but rollout.engine={rollout.engine}; leave the "
                "section out, or set engine to vllm"
            )
        return
    for name in OF_OWN_SERVERS:
        if vllm.urls and getattr(vllm, name) != getattr(VllmSettings(), name):
            yield (
                f"rollout.vllm.{name} is about servers that the run starts, and rollout.vllm.urls names servers that "
                "already run: leave one of them out"
            )
    yield from of_addresses(vllm.urls)
    yield from of_devices(vllm)
    if vllm.max_model_len is not None and vllm.max_model_len <= rollout.max_new_tokens:
        yield (
            f"rollout.vllm.max_model_len={vllm.max_model_len} leaves no room for a prompt beside "
            f"rollout.max_new_tokens={rollout.max_new_tokens}: raise the first or lower the second"
        )
    if 0 < rollout.temperature < COLDEST:
        yield (
            f"rollout.temperature={rollout.temperature:g} is below {COLDEST:g}, and vLLM would sample at that: "
            "raise it, or set it to 0"
        )
    yield from of_transfer(rollout)


def of_hang(rollout: RolloutSettings, run: RunSettings) -> Iterator[str]:
    """The limits after which a server, or the run, counts as hung."""
    if rollout.engine == "vllm" and run.hang_timeout_s is not None and run.hang_timeout_s < rollout.vllm.hang_timeout_s:
        yield (
            f"run.hang_timeout_s={run.hang_timeout_s:g} is below rollout.vllm.hang_timeout_s="
            f"{rollout.vllm.hang_timeout_s:g}, so a server that hangs would end the run before it is started again: "
            "raise the first or lower the second"
        )


def of_addresses(urls: tuple[str, ...]) -> Iterator[str]:
    """The addresses of servers that already run."""
    found: dict[tuple[str, int | None], str] = {}
    for url in urls:
        example = "an address has http://, a host and a port, such as http://node7:8000"
        try:
            parts = urlsplit(url)
            place = (parts.hostname, parts.port)
        except ValueError as error:
            yield f"rollout.vllm.urls holds {url!r} ({error}); {example}"
            continue
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            yield f"rollout.vllm.urls holds {url!r}; {example}"
        elif place in found:
            yield f"rollout.vllm.urls names a server twice, as {found[place]} and {url}; name each once"
        found[place] = url


def of_devices(vllm: VllmSettings) -> Iterator[str]:
    """The GPUs of servers that the run starts."""
    if not vllm.devices:
        return
    groups = [[gpu.strip() for gpu in group.split(",")] for group in vllm.devices]
    if len(groups) != vllm.servers:
        yield (
            f"rollout.vllm.devices has {count_text(len(groups), 'entry')} for rollout.vllm.servers={vllm.servers}: "
            "give the GPUs of each server, such as ['6', '7']"
        )
    for group, named in zip(groups, vllm.devices, strict=True):
        if len(group) < vllm.tensor_parallel:
            yield (
                f"rollout.vllm.devices gives a server the GPUs {named!r}, and "
                f"rollout.vllm.tensor_parallel={vllm.tensor_parallel} needs {vllm.tensor_parallel} of them"
            )
    every = [gpu for group in groups for gpu in group]
    if len(set(every)) != len(every):
        yield f"rollout.vllm.devices names GPU {max(every, key=every.count)} twice; give each GPU to one server"


def of_transfer(rollout: RolloutSettings) -> Iterator[str]:
    """How weights reach the servers of engine=vllm."""
    vllm, name = rollout.vllm, f"rollout.vllm.transfer={rollout.vllm.transfer}"
    if vllm.transfer == "file":
        return
    if rollout.lora_transfer == "adapter":
        yield (
            f"{name} sends complete weights, and rollout.lora_transfer=adapter sends adapters through files: set "
            "lora_transfer to merged or transfer to file"
        )
    if vllm.transfer_folder is not None:
        yield (
            f"rollout.vllm.transfer_folder belongs to transfer=file, and {name} writes no files; leave transfer_folder "
            "out"
        )
    if vllm.transfer == "ipc" and vllm.urls:
        yield (
            f"{name} shares the GPUs of the ranks with servers that the run starts, and rollout.vllm.urls names "
            "servers that already run: leave urls out, or set transfer to nccl or file"
        )
    if vllm.transfer == "ipc" and not (vllm.urls or vllm.devices):
        yield (
            f"rollout.vllm.devices is not set, and {name} needs the GPUs of each server, such as ['0,1', '2,3']: they "
            "are those of the ranks"
        )
    if vllm.transfer == "ipc" and rollout.ahead:
        yield (
            f"{name} lets the servers sleep while a step trains, and rollout.ahead=1 samples at that time: set ahead "
            "to 0 or transfer to nccl or file"
        )
