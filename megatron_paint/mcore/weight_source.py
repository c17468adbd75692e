"""The current weights under their Hugging Face names, message by message, for engines outside of this process."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import ModelSettings
from megatron_paint.mcore.hf_checkpoint import base_parameters, export_adapters, export_stage
from megatron_paint.mcore.lora import merged_weight
from megatron_paint.mcore.model import DTYPES, Stage
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.models.qwen3.mapping import hugging_face_shapes, rule_of
from megatron_paint.models.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class StageWeights:
    """Implements `rollouts.vllm.weights.WeightSource`.

    The ranks of the first replica gather. The messages of a stage go round among its tensor-parallel ranks, so that
    they share the writing. A tied head is sent as well: on a CPU, vLLM has a packed copy of it.
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
        if number >= len(self.messages) or self.ranks.dp_cp_rank > 0:
            return {}
        parameters = dict(base_parameters(self.stage))
        gathered = {name: self._gathered(name, parameters[name], number) for name in self.messages[number]}
        if not self._owns(number):
            return {}
        tensors = {}
        for parameter, shards in gathered.items():
            found = self._rule(parameter).unload(shards)
            tensors |= {name: tensor.cpu().contiguous() for name, tensor in found.items()}
            if self.shape.tied and EMBEDDING in found:
                tensors[HEAD] = tensors[EMBEDDING]
        return tensors

    @torch.no_grad()
    def check_finite(self) -> None:
        # A sum finds NaN and infinity in one pass. Only a sum that is not finite needs the second look.
        for name, tensor in self.stage.named_parameters():
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise UserError(f"{name} is not finite: the training diverged. No server gets these weights")

    def export(self, folder: Path) -> None:
        export_stage(
            self.stage,
            folder,
            shape=self.shape,
            ranks=self.ranks,
            dtype=self.dtype,
            source=self.model.hf_path,
            tokenizer=self.model.adapter_path,
        )

    def export_adapters(self, folder: Path) -> None:
        export_adapters(
            self.stage,
            folder,
            lora=self.model.lora,
            ranks=self.ranks,
            source=self.model.hf_path,
            tokenizer=self.model.adapter_path,
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
            layer, is_expert, _ = name.partition(".mlp.experts.")
            if is_expert:
                experts.setdefault(layer, []).append(name)
            else:
                yield [name]
        yield from experts.values()

    def _owns(self, number: int) -> bool:
        ranks = self.ranks
        return ranks.dp_cp_rank == 0 and number < len(self.messages) and number % ranks.tp_size == ranks.tp_rank

    def _rule(self, parameter: str):
        return rule_of(parameter, self.shape)

    def _names(self, parameter: str) -> list[str]:
        names = list(self._rule(parameter).hf_shapes())
        return names + ([HEAD] if self.shape.tied and EMBEDDING in names else [])

    def _nbytes(self, parameter: str) -> int:
        rule = self._rule(parameter)
        return sum(torch.Size(shape).numel() for shape in rule.hf_shapes().values()) * self.dtype.itemsize

    def _gathered(self, name: str, parameter: Tensor, number: int) -> list[Tensor]:
        """The parts of all tensor-parallel ranks, on the rank that writes the message."""
        value, ranks = merged_weight(self.stage, name, parameter).to(self.dtype), self.ranks
        if ranks.tp_size == 1:
            return [value]
        parts = [torch.empty_like(value) for _ in range(ranks.tp_size)] if self._owns(number) else None
        dist.gather(value.contiguous(), parts, group_dst=number % ranks.tp_size, group=ranks.tp_group)
        return parts or []
