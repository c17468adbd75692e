"""The current weights under their Hugging Face names, message by message, for engines outside of this process."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import ModelSettings
from megatron_paint.mcore.hf_checkpoint import base_parameters, export_adapters, export_stage
from megatron_paint.mcore.lora import merged_weight
from megatron_paint.mcore.model import DTYPES, Stage
from megatron_paint.mcore.ranks import Ranks, is_expert
from megatron_paint.models.qwen3.mapping import Rule, hugging_face_shapes, rule_of
from megatron_paint.models.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class StageWeights:
    """Implements `rollouts.vllm.weights.WeightSource`.

    The ranks of the first replica gather, and for experts the ranks that together have all experts of a layer. The
    messages of a stage go round among the first replica's tensor-parallel ranks, so that they share the writing. A tied
    head is sent as well: on a CPU, vLLM has a packed copy of it.
    """

    def __init__(self, stage: Stage, shape: ModelShape, ranks: Ranks, model: ModelSettings):
        self.stage, self.shape, self.ranks, self.model = stage, shape, ranks, model
        self.dtype = DTYPES[model.dtype]
        self.messages: list[list[str]] = []  # names of Megatron's parameters

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = dict(hugging_face_shapes(self.shape))
        return found | ({HEAD: found[EMBEDDING]} if self.shape.tied else {})

    def plan(self, message_bytes: int) -> list[list[str]]:
        self._divide(message_bytes)
        return [
            [name for parameter in message for name in self._names(parameter)] if self._owns(number) else []
            for number, message in enumerate(self.messages)
        ]

    @torch.no_grad()
    def message(self, number: int) -> dict[str, Tensor]:
        if number >= len(self.messages):
            return {}
        parameters = dict(base_parameters(self.stage))
        tensors: dict[str, Tensor] = {}
        for parameter in self.messages[number]:
            found = self._complete(parameter, parameters[parameter], number)
            tensors |= {name: tensor.cpu().contiguous() for name, tensor in found.items()}
            if self.shape.tied and EMBEDDING in found:
                tensors[HEAD] = tensors[EMBEDDING]
        return tensors

    @torch.no_grad()
    def check_finite(self) -> None:
        self.stage.complete_weights()
        # A sum finds NaN and infinity in one pass. Only a sum that is not finite needs the second look.
        for name, tensor in self.stage.named_parameters():
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise UserError(f"{name} is not finite: the training diverged. No server gets these weights")

    def export(self, folder: Path, *, card: str | None = None) -> None:
        self.stage.complete_weights()
        export_stage(
            self.stage,
            folder,
            shape=self.shape,
            ranks=self.ranks,
            dtype=self.dtype,
            source=self.model.hf_path,
            tokenizer=self.model.adapter_path,
            card=card,
        )

    def export_adapters(self, folder: Path, *, card: str | None = None) -> None:
        export_adapters(
            self.stage,
            folder,
            lora=self.model.lora,
            ranks=self.ranks,
            source=self.model.hf_path,
            tokenizer=self.model.adapter_path,
            card=card,
        )

    def _divide(self, message_bytes: int) -> None:
        self.messages, filled = [], 0
        for module in self._modules():
            size = sum(self._nbytes(name) for name in module)
            if not self.messages or filled + size > message_bytes:
                self.messages.append([])
                filled = 0
            self.messages[-1] += module
            filled += size

    def _modules(self) -> Iterator[list[str]]:
        """The parameters of each of vLLM's modules; one of Megatron's is one of vLLM's, except that experts are one."""
        experts: dict[str, list[str]] = {}
        for name, _ in base_parameters(self.stage):
            if name == "output_layer.weight" and self.shape.tied:
                continue
            if is_expert(name):
                experts.setdefault(name.partition(".mlp.experts.")[0], []).append(name)
            else:
                yield [name]
        yield from experts.values()

    def _owner(self, number: int) -> int:
        """The tensor-parallel rank of the first replica that writes a message of this stage."""
        return number % self.ranks.tp_size

    def _owns(self, number: int) -> bool:
        ranks = self.ranks
        return ranks.dp_cp_rank == 0 and number < len(self.messages) and ranks.tp_rank == self._owner(number)

    def _rules(self, parameter: str) -> list[Rule]:
        """The rules of a parameter; of one of an expert, those that the expert-parallel ranks have under this name."""
        experts, ranks = self.shape.num_experts, self.ranks.ep_size if is_expert(parameter) else 1
        return [rule_of(parameter, self.shape, first_expert=rank * experts // ranks) for rank in range(ranks)]

    def _names(self, parameter: str) -> list[str]:
        names = [name for rule in self._rules(parameter) for name in rule.hf_shapes()]
        return names + ([HEAD] if self.shape.tied and EMBEDDING in names else [])

    def _nbytes(self, parameter: str) -> int:
        shapes = (shape for rule in self._rules(parameter) for shape in rule.hf_shapes().values())
        return sum(torch.Size(shape).numel() for shape in shapes) * self.dtype.itemsize

    def _complete(self, name: str, parameter: Tensor, number: int) -> dict[str, Tensor]:
        """The Hugging Face tensors of a parameter, on the rank that writes the message; empty on the others."""
        ranks, owner = self.ranks, self._owner(number)
        group, block, owners = ranks.tp_group, ranks.dp_cp_rank, 0
        if is_expert(name):
            group, block = ranks.expert_group, ranks.expert_shards.replica
            owners, owner = divmod(owner, dist.get_world_size(group))
        if block != owners:
            return {}
        value = merged_weight(self.stage, name, parameter).to(self.dtype)
        parts = [value]
        if (size := dist.get_world_size(group)) > 1:
            parts = [torch.empty_like(value) for _ in range(size)] if self._owns(number) else None
            dist.gather(value.contiguous(), parts, group_dst=owner, group=group)
        return self._unload(name, parts) if self._owns(number) else {}

    def _unload(self, name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The Hugging Face tensors of a parameter. parts: of all ranks that have it, or an expert under its name."""
        rules = self._rules(name)
        shards, tensors = len(parts) // len(rules), {}
        for place, rule in enumerate(rules):
            tensors |= rule.unload(parts[place * shards : (place + 1) * shards])
        return tensors
