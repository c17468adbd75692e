"""Seconds of collectives, by the links that they use.

Ranks are numbered as in Megatron: tensor, context, data, stage.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_paint.planning.search.candidate import Candidate
from megatron_paint.planning.search.efficiency import LATENCY, NETWORK, NVLINK
from megatron_paint.planning.search.machines import Gpu
from megatron_paint.planning.search.seconds import Seconds


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate. stride: the distance between two neighbours of the group in the order of all ranks."""

    gpu: Gpu
    ranks: int
    stride: int

    @cached_property
    def on_node(self) -> int:
        """Ranks of the group on one node."""
        return max(1, min(self.ranks, self.gpu.gpus_per_node // self.stride))

    @cached_property
    def nodes(self) -> float:
        """Nodes that the group is spread over."""
        return self.ranks / self.on_node

    def gather(self, size: float) -> Seconds:
        """All-gather of `size` bytes in total, or reduce-scatter of as many.

        Within a node each rank receives (n - 1) / n of it. Over m nodes each node receives (m - 1) / m of it, through
        the network cards of its ranks of the group.
        """
        if self.ranks == 1 or not size:
            return Seconds()
        local = size * (self.on_node - 1) / self.on_node / (self.gpu.nvlink * NVLINK)
        if self.nodes == 1:
            return Seconds(nvlink=local + LATENCY["nvlink"])
        remote = size * (self.nodes - 1) / self.nodes / (self.on_node * self.gpu.network * NETWORK)
        return Seconds(nvlink=local, network=remote + LATENCY["network"])

    def reduce(self, size: float) -> Seconds:
        """All-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size)

    def exchange(self, size: float) -> Seconds:
        """All-to-all in which each rank has `size` bytes, an equal part for each rank."""
        if self.ranks == 1 or not size:
            return Seconds()
        local = size * (self.on_node - 1) / self.ranks / (self.gpu.nvlink * NVLINK)
        if self.nodes == 1:
            return Seconds(nvlink=local + LATENCY["nvlink"])
        remote = size * (self.ranks - self.on_node) / self.ranks / (self.gpu.network * NETWORK)
        return Seconds(nvlink=local, network=remote + LATENCY["network"])

    def send(self, size: float) -> Seconds:
        """A message of `size` bytes to the next rank of the group."""
        if self.ranks == 1 or not size:
            return Seconds()
        if self.nodes == 1:
            return Seconds(nvlink=size / (self.gpu.nvlink * NVLINK) + LATENCY["nvlink"])
        return Seconds(network=size / (self.gpu.network * NETWORK) + LATENCY["network"])


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of a layout's rank."""

    gpu: Gpu
    layout: Candidate

    def _group(self, ranks: int, stride: int) -> Group:
        return Group(gpu=self.gpu, ranks=ranks, stride=stride)

    @cached_property
    def tensor(self) -> Group:
        return self._group(self.layout.tp, 1)

    @cached_property
    def context(self) -> Group:
        return self._group(self.layout.cp, self.layout.tp)

    @cached_property
    def data(self) -> Group:
        """Replicas of the weights that are no experts: data and context parallel ranks."""
        return self._group(self.layout.dp * self.layout.cp, self.layout.tp)

    @cached_property
    def stages(self) -> Group:
        return self._group(self.layout.pp, self.layout.tp * self.layout.cp * self.layout.dp)

    @cached_property
    def expert_tensor(self) -> Group:
        return self._group(self.layout.etp, 1)

    @cached_property
    def expert(self) -> Group:
        return self._group(self.layout.ep, self.layout.etp)

    @cached_property
    def expert_data(self) -> Group:
        return self._group(self.layout.expert_dp, self.layout.ep * self.layout.etp)
