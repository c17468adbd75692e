"""A model with its weights on all ranks, and its sampler: the part of the policy that an evaluation needs."""

from megatron_paint.checkpoints.adapter_reader import checked_adapter
from megatron_paint.checkpoints.hub import hub_model
from megatron_paint.checkpoints.megatron_folder import megatron_folder
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import ModelSettings, RolloutSettings
from megatron_paint.mcore.batch import token_multiple
from megatron_paint.mcore.checkpoint import has_adapters, load_weights
from megatron_paint.mcore.fixed_steps import CudaCapture
from megatron_paint.mcore.generate import BatchLimits, MegatronSampler
from megatron_paint.mcore.hf_checkpoint import load_stage
from megatron_paint.mcore.lora import add_adapters, load_adapters
from megatron_paint.mcore.model import build_model
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.layout import cache_bytes_per_token


class ModelRunner:
    """This rank's part of a model with its weights; `sampler` samples from it."""

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
        adapter = checked_adapter(model, shape)
        load_stage(self.stage, model.hf_path, shape, ranks, merged=adapter if model.lora is None else None)
        start = None if model.megatron_path is None else megatron_folder(model.megatron_path)
        # What the user should know about the weights.
        self.notes = () if adapter is None else (adapter.note(model.lora),)
        if (on_hub := hub_model(model.hf_path)) is not None:
            self.notes += (f"the model is {on_hub.id} on the hub, revision {on_hub.revision}",)
        adapted = start is not None and loads_adapters and model.lora is not None and has_adapters(start)
        if start is not None and not adapted:
            self.notes += load_weights(self.stage, start, shape)
        if model.lora is not None:
            add_adapters(self.stage, model.lora, shape, ranks, seed=seed)
            if adapter is not None:
                load_adapters(self.stage, adapter, ranks)
        if adapted:
            self.notes += load_weights(self.stage, start, shape)
        self.multiple = token_multiple(megatron)
        token_bytes = cache_bytes_per_token(shape, dtype=model.dtype, megatron=megatron)
        self.sampler = MegatronSampler(
            self.stage,
            ranks,
            token_multiple=self.multiple,
            limits=BatchLimits(
                rows=rollout.batch_size,
                prefill_tokens=micro_batch_tokens,
                cache_tokens=int(rollout.cache_bytes // token_bytes),
            ),
            capture=CudaCapture if rollout.cuda_graphs else None,
        )
