"""A model with its weights on all ranks, which samples: the part of the policy that an evaluation needs."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_paint.config.settings import MegatronSettings, ModelSettings, RolloutSettings
from megatron_paint.mcore.batch import assign_replicas, token_multiple
from megatron_paint.mcore.checkpoint import has_adapters, load_weights
from megatron_paint.mcore.generate import BatchLimits, Generator
from megatron_paint.mcore.hf_checkpoint import load_stage
from megatron_paint.mcore.lora import add_adapters
from megatron_paint.mcore.model import build_model
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.layout import cache_bytes_per_token
from megatron_paint.policy import GenerationRequest, SamplingParameters
from megatron_paint.records import Rollout


class ModelRunner:
    """Builds this rank's part of a model, loads its weights, and samples."""

    def __init__(
        self,
        shape: ModelShape,
        ranks: Ranks,
        *,
        model: ModelSettings,
        megatron: MegatronSettings,
        rollout: RolloutSettings,
        micro_batch_tokens: int,
        seed: int,
        loads_adapters: bool = True,
    ):
        """micro_batch_tokens: most prompt tokens, padding included, of one call. seed: of new adapters.

        loads_adapters: adapters in the checkpoint at model.megatron_path are loaded. Without it, only its weights are:
        a training run begins with new adapters.
        """
        self.shape = shape
        self.ranks = ranks
        self.stage = build_model(shape, model, megatron, ranks)
        load_stage(self.stage, model.hf_path, shape, ranks)
        start = model.megatron_path
        adapted = start is not None and loads_adapters and model.lora is not None and has_adapters(start)
        if start is not None and not adapted:
            load_weights(self.stage, start)
        if model.lora is not None:
            add_adapters(self.stage, model.lora, shape, ranks, seed=seed)
        if adapted:
            load_weights(self.stage, start)
        self.multiple = token_multiple(megatron)
        token_bytes = cache_bytes_per_token(shape, dtype=model.dtype, megatron=megatron)
        self.generator = Generator(
            self.stage,
            ranks,
            token_multiple=self.multiple,
            limits=BatchLimits(
                rows=rollout.batch_size,
                prefill_tokens=micro_batch_tokens,
                cache_tokens=int(rollout.cache_bytes // token_bytes),
            ),
        )

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """One rollout per request, in order. Replicas share the requests and exchange their rollouts."""
        most = [len(r.prompt_ids) + sampling.max_new_tokens for r in requests]
        taken = assign_replicas(most, self.ranks.dp_size)[self.ranks.dp_rank]
        rollouts = self.generator.generate([requests[i] for i in taken], sampling)
        speaks = self.ranks.tp_rank == 0 and self.ranks.is_last_stage
        merged = self._exchange(dict(zip(taken, rollouts, strict=True)) if speaks else {})
        return [merged[i] for i in range(len(requests))]

    def _exchange(self, mine: dict[int, Any]) -> dict[int, Any]:
        """The entries of all ranks."""
        everyone: list[dict[int, Any]] = [{} for _ in range(self.ranks.size)]
        dist.all_gather_object(everyone, mine, group=self.ranks.host_group)
        return {index: value for entries in everyone for index, value in entries.items()}
