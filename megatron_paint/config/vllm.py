"""Settings of vLLM as a rollout engine: where its servers are, how ours are started, and how weights reach them."""

from dataclasses import field
from typing import Annotated, Literal

from megatron_paint.config.dialect import Count, Number, Positive, Text, Whole, setting, settings_class

VLLM = "vLLM's name and default"
COLDEST, HOTTEST = 0.01, 2.0  # temperatures that vLLM takes beside 0; it samples at COLDEST where a lower one is asked

# Settings of servers that the run starts; they have no effect on those of `urls`.
OF_OWN_SERVERS = ("servers", "command", "devices", "environment", "extra_args", "max_model_len")
OF_OWN_SERVERS += ("tensor_parallel", "gpu_memory")

Transfer = Literal["file", "nccl", "ipc"]


def logprobs_mode(temperature: float) -> str:
    """The mode in which vLLM's log-probabilities are those of a `Rollout` for most settings.

    At temperature 1 the raw ones are right also under top-k and top-p. At others the processed ones are, without a cut.
    """
    return "raw_logprobs" if temperature == 1 else "processed_logprobs"


def has_logprobs(mode: str, *, temperature: float, top_p: float, top_k: int) -> bool:
    """Whether a mode reports those of a `Rollout`: at the temperature, before top-k and top-p."""
    if temperature == 0:
        return False
    return temperature == 1 if mode == "raw_logprobs" else top_p == 1 and top_k == 0


@settings_class
class VllmSettings:
    """vLLM servers for engine=vllm. They are given by `urls`, or the run starts `servers` of them beside rank 0."""

    urls: Annotated[
        tuple[Text, ...],
        setting("addresses of running servers, such as [http://node7:8000]; empty: the run starts its own servers"),
    ] = ()
    servers: Annotated[Count, setting("servers that the run starts on the machine of rank 0, if urls is empty")] = 1
    command: Annotated[
        tuple[Text, ...] | None,
        setting(
            "program that starts a server, without options, such as [/envs/vllm/bin/vllm, serve]; null: vLLM's API "
            "server in the Python environment of the run"
        ),
    ] = None
    devices: Annotated[
        tuple[Text, ...],
        setting("CUDA_VISIBLE_DEVICES of each server that the run starts, such as ['6', '7']; empty: inherited"),
    ] = ()
    environment: Annotated[
        dict[Text, Text], setting("more environment variables of the servers that the run starts")
    ] = field(default_factory=dict)
    tensor_parallel: Annotated[Count, setting("GPUs of a server (--tensor-parallel-size)", source=VLLM)] = 1
    gpu_memory: Annotated[
        Number, setting("fraction of a GPU's memory for a server (--gpu-memory-utilization)", source=VLLM, gt=0, le=1)
    ] = 0.9
    max_model_len: Annotated[
        Count | None, setting("most tokens of a prompt and its response (--max-model-len); null: the model's positions")
    ] = None
    extra_args: Annotated[tuple[Text, ...], setting("more options of the command, each word separate")] = ()
    requests: Annotated[Count, setting("most requests that one server gets at the same time")] = 256
    start_timeout_s: Annotated[Positive, setting("limit on the start of a server, in seconds")] = 1200.0
    hang_timeout_s: Annotated[
        Positive, setting("seconds without an answer of a server's engine after which the server counts as dead")
    ] = 300.0
    restarts: Annotated[
        Whole, setting("how often the run may restart servers that died; it cannot restart those of urls", ge=0)
    ] = 3
    transfer: Annotated[
        Transfer,
        setting(
            "how weights reach the servers: through files; nccl: from the GPU of rank 0 to servers on other GPUs; ipc: "
            "to servers on the GPUs of the ranks, which sleep while a step trains. nccl and ipc never ran on a GPU yet"
        ),
    ] = "file"
    transfer_folder: Annotated[
        Text | None,
        setting(
            "transfer=file: folder through which weights reach the servers, which ranks and servers see; null: "
            "/dev/shm, which only one machine sees"
        ),
    ] = None
