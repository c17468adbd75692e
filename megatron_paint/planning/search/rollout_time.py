"""Seconds of sampling: prompts at once, then token after token, by the trainer's own sampler or by vLLM servers."""

import math
from dataclasses import dataclass, replace

from megatron_paint.base.errors import UserError
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.memory import size_text
from megatron_paint.planning.search.candidate import Candidate, divisors
from megatron_paint.planning.search.efficiency import HOST_PER_TOKEN, NETWORK
from megatron_paint.planning.search.layer_time import WIDTH, LayerTime
from megatron_paint.planning.search.seconds import Seconds
from megatron_paint.planning.search.workload import Workload

SERVER_MEMORY = 0.9  # of a GPU's memory: vLLM's default
SERVER_WEIGHTS = 0.6  # of that, for weights; the rest is for keys and values. Ours


@dataclass(frozen=True, kw_only=True)
class RolloutTime:
    """Times of a layout that samples. `layer` has the layout of one replica."""

    layer: LayerTime
    host: str  # "trainer" or "vllm"
    replicas: int  # that share the requests
    rows: int  # most responses that a replica decodes together
    cache_bytes: float  # of keys and values that a rank may hold

    def seconds(self, work: Workload, *, prefill_tokens: int) -> tuple[Seconds, Seconds]:
        """The times of all prompts and of all decoding steps. prefill_tokens: most tokens of the prompts of a batch."""
        requests = math.ceil(work.sequences / self.replicas)
        rows = min(self.rows, requests, max(1, int(prefill_tokens // work.prompt)), self._cached_rows(work))
        batches = math.ceil(requests / rows)
        live = requests / batches
        prefill = self._stages(self.layer.forward(live * work.prompt, work.prompt / 2))
        # Finished rows leave the batch; the longest response needs all decoding steps.
        decoding = live * work.response / work.new_tokens
        steps = batches * work.new_tokens
        return batches * prefill, steps * self.token(decoding, work.prompt + work.response / 2)

    def token(self, rows: float, context: float) -> Seconds:
        """One decoding step of `rows` rows: every stage after the other, and a token's logits."""
        layer, shape, tp = self.layer, self.layer.shape, self.layer.layout.tp
        keys = 2 * shape.num_groups * shape.head_dim / tp * WIDTH
        each = replace(layer.device(rows, context), attention=layer.read(rows * context * keys))
        wait = max(0.0, layer.host_seconds(self.host) - each.total)
        rest = Seconds(
            products=layer.product(rows, shape.vocab_rows(tp) * shape.hidden_size), host=HOST_PER_TOKEN[self.host]
        )
        sent = layer.groups.stages.send(rows * shape.hidden_size * WIDTH)
        return self._stages(each + Seconds(host=wait)) + (layer.layout.pp - 1) * sent + rest

    def _stages(self, each: Seconds) -> Seconds:
        """All layers of the model: a batch is on one stage at a time."""
        return self.layer.shape.num_layers * each

    def _cached_rows(self, work: Workload) -> int:
        """Rows whose keys and values fit into the cache of a rank."""
        shape, layout = self.layer.shape, self.layer.layout
        token = shape.num_layers / layout.pp * 2 * shape.num_groups / layout.tp * shape.head_dim * WIDTH
        return max(1, int(self.cache_bytes // (token * (work.prompt + work.new_tokens))))


def server_layout(layer: LayerTime, *, gpus: int) -> tuple[Candidate, int]:
    """The layout of a vLLM server and the number of servers: the fewest GPUs a server that hold the weights.

    Keys and values get less than their share where only the largest server holds the weights. UserError: none does.
    """
    gpu, weights = layer.gpu, layer.shape.num_parameters * WIDTH
    usable, most = gpu.memory * SERVER_MEMORY, min(gpus, gpu.gpus_per_node)
    sizes = [size for size in divisors(most) if _can_share(layer.shape, size)]
    holding = [size for size in sizes if weights < size * usable]
    if not holding:
        raise UserError(
            f"--sampling-gpus={gpus}: no vLLM server holds the {size_text(weights)} of weights. A server of "
            f"{', '.join(map(str, sizes))} GPUs may use {SERVER_MEMORY:g} of their memory, {size_text(usable)} each. "
            f"Give more GPUs, of which a server takes at most the {gpu.gpus_per_node} of a node, or larger ones"
        )
    size = next((size for size in holding if weights <= size * usable * SERVER_WEIGHTS), holding[-1])
    experts = {"ep": size, "etp": 1} if layer.shape.num_experts else {}
    return Candidate(tp=size, **experts), max(1, gpus // size)


def _can_share(shape: ModelShape, size: int) -> bool:
    """Whether vLLM can divide the heads among the GPUs of a server; it copies key-value groups where they are fewer."""
    groups = shape.num_groups
    return shape.num_heads % size == 0 and (groups % size == 0 or size % groups == 0)


def server_cache_bytes(layer: LayerTime, layout: Candidate) -> float:
    """Bytes of keys and values that each GPU of a server may hold."""
    weights = layer.shape.num_parameters * WIDTH / layout.tp
    return max(0.0, layer.gpu.memory * SERVER_MEMORY - weights)


def transfer(layer: LayerTime) -> Seconds:
    """New weights for the servers: rank 0 sends all of them, through the network card of its GPU."""
    return Seconds(network=layer.shape.num_parameters * WIDTH / (layer.gpu.network * NETWORK))
