"""The current weights, complete on the GPU of every rank of a replica, for transfers that leave out the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_paint.config.settings import ModelSettings
from megatron_paint.mcore.collectives import gather_entries
from megatron_paint.mcore.hf_checkpoint import base_parameters
from megatron_paint.mcore.lora import merged_weight
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks, is_expert
from megatron_paint.mcore.weight_source import StageWeights
from megatron_paint.models.qwen3.mapping import hugging_face_shapes
from megatron_paint.models.shape import ModelShape


class ReplicaWeights(StageWeights):
    """Implements `rollouts.vllm.weights.DeviceWeights`.

    The tensor-parallel ranks of a stage gather each module. Experts are gathered over the ranks that together have all
    experts of a layer. The stage then broadcasts the tensors to the other stages. So every rank of a replica has every
    tensor while one message is sent. A gather to rank 0 would be enough for rank 0, but a server on another rank's GPU
    can read only what that rank has.
    A tied head is not sent: on a GPU it is the memory of the embedding.
    """

    def __init__(self, stage: Stage, shape: ModelShape, ranks: Ranks, model: ModelSettings, *, all_replicas: bool):
        """all_replicas: False: only the ranks of the first replica gather; the others have no tensor."""
        super().__init__(stage, shape, ranks, model)
        self.takes_part = all_replicas or ranks.dp_cp_rank == 0
        # The first copy of the weights may lack some experts. Ranks of other copies have them.
        first = ranks.expert_shards.replica * dist.get_world_size(ranks.expert_group)
        self.lends_experts = self.takes_part or (shape.num_experts > 0 and first < ranks.tp_size)
        self.stages: list[int] = []  # the stage of each message
        self.names: list[list[str]] = []  # of each message

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(hugging_face_shapes(self.shape))

    def plan(self, message_bytes: int) -> list[list[str]]:
        self._divide(message_bytes)
        mine = [
            [name for parameter in message for rule in self._rules(parameter) for name in rule.hf_shapes()]
            for message in self.messages
        ]
        stages = gather_entries({self.ranks.pp_rank: mine}, self.ranks)
        self.stages = [stage for stage in sorted(stages) for _ in stages[stage]]
        self.names = [message for stage in sorted(stages) for message in stages[stage]]
        return self.names

    @torch.no_grad()
    def message(self, number: int) -> dict[str, Tensor]:
        if not self.lends_experts:
            return {}
        stage, ranks = self.stages[number], self.ranks
        with self._apart():
            if stage == ranks.pp_rank:
                found = self._own(number - self.stages.index(stage))
            elif not self.takes_part:
                found = {}
            else:
                shapes = self.shapes()
                found = {
                    name: torch.empty(shapes[name], dtype=self.dtype, device=ranks.device)
                    for name in self.names[number]
                }
            if ranks.pp_size > 1 and self.takes_part:
                for tensor in found.values():
                    dist.broadcast(tensor, group=ranks.pp_group, group_src=stage)
        return found

    def free_memory(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _own(self, number: int) -> dict[str, Tensor]:
        """The tensors of message `number` of this stage; empty on a rank that only lends its experts."""
        parameters, tensors = dict(base_parameters(self.stage)), {}
        for name in self.messages[number]:
            expert = is_expert(name)
            if not (self.takes_part or expert):
                continue
            group = self.ranks.expert_group if expert else self.ranks.tp_group
            value = merged_weight(self.stage, name, parameters[name]).to(self.dtype).contiguous()
            parts = [value]
            if (size := dist.get_world_size(group)) > 1:
                parts = [torch.empty_like(value) for _ in range(size)]
                dist.all_gather(parts, value, group=group)
            if self.takes_part:
                tensors |= {key: tensor.contiguous() for key, tensor in self._unload(name, parts).items()}
        return tensors

    @cached_property
    def _stream(self) -> "torch.cuda.Stream":
        return torch.cuda.Stream(self.ranks.device)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Gathers on a separate stream. Before it and after it, the device completes all its work.

        vLLM packs tensors on several streams in turn, each without waiting for the others. A module gives it more than
        one tensor, so one of them may be packed on another stream than the one that would have gathered it. Memory of
        this stream is used again only by the next message, after all streams have read the one before.
        """
        if self.ranks.device.type != "cuda":
            yield
            return
        torch.cuda.synchronize(self.ranks.device)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize(self.ranks.device)
