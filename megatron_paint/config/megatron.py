"""Settings of Megatron-Core and Transformer Engine, under their own names."""

from typing import Annotated, Literal

from megatron_paint.config.dialect import (
    MEGATRON,
    MEGATRON_NAME,
    Count,
    Flag,
    Number,
    Positive,
    Text,
    Whole,
    setting,
    settings_class,
)


@settings_class
class MegatronSettings:
    """Settings of Megatron-Core and Transformer Engine, under their own names; null leaves their default."""

    tensor_model_parallel_size: Annotated[Count, setting("ranks that share each layer", source=MEGATRON)] = 1
    pipeline_model_parallel_size: Annotated[Count, setting("stages that share the layers", source=MEGATRON)] = 1
    context_parallel_size: Annotated[Count, setting("ranks that share the tokens of each row", source=MEGATRON)] = 1
    virtual_pipeline_model_parallel_size: Annotated[
        Count | None,
        setting(
            "chunks of layers on each stage, which a micro-batch visits in turn, for less waiting between stages; "
            "null: one, or what pipeline_model_parallel_layout has",
            source=MEGATRON,
        ),
    ] = None
    num_layers_in_first_pipeline_stage: Annotated[
        Count | None, setting("layers of the first stage; null: as many as each further stage", source=MEGATRON)
    ] = None
    num_layers_in_last_pipeline_stage: Annotated[
        Count | None, setting("layers of the last stage; null: as many as each further stage", source=MEGATRON)
    ] = None
    account_for_embedding_in_pipeline_split: Annotated[
        Flag, setting("count the embedding as a layer of the first stage, which gets one less", source=MEGATRON)
    ] = False
    account_for_loss_in_pipeline_split: Annotated[
        Flag, setting("count the loss as a layer of the last stage, which gets one less", source=MEGATRON)
    ] = False
    pipeline_model_parallel_layout: Annotated[
        Text | None,
        setting(
            "which layers each chunk has, such as Et*3|t*4L. E is the embedding, t a layer, L the loss; | begins the "
            "next chunk. First come the first chunks of all stages, then their second chunks. null: the settings above "
            "divide the layers",
            source=MEGATRON,
        ),
    ] = None
    expert_model_parallel_size: Annotated[
        Count, setting("ranks of a stage that share the experts of a mixture: each has some of them", source=MEGATRON)
    ] = 1
    expert_tensor_parallel_size: Annotated[
        Count | None,
        setting(
            "ranks that share each expert of a mixture; null: tensor_model_parallel_size. 1 is usual for Qwen3, whose "
            "experts are small",
            source=MEGATRON,
        ),
    ] = None
    moe_router_load_balancing_type: Annotated[
        Literal["none", "aux_loss"],
        setting(
            "aux_loss: an auxiliary loss that balances the load of the experts within each micro-batch of a replica",
            source=MEGATRON_NAME,
        ),
    ] = "none"
    moe_aux_loss_coeff: Annotated[
        Number,
        setting(
            "coefficient of the auxiliary loss: a mean over all tokens of a step, prompts and padding too",
            source=MEGATRON,
            ge=0,
        ),
    ] = 0.0
    moe_z_loss_coeff: Annotated[
        Positive | None,
        setting(
            "weight of the z-loss of a mixture's routers, which keeps their logits small: the mean square of log sum "
            "exp over all tokens of a step, prompts and padding too",
            source=MEGATRON,
        ),
    ] = None
    sequence_parallel: Annotated[
        Flag, setting("split activations between layers over the tensor-parallel ranks", source=MEGATRON)
    ] = False
    use_distributed_optimizer: Annotated[
        Flag, setting("shard the optimiser's state over data-parallel ranks", source=MEGATRON_NAME)
    ] = True
    num_distributed_optimizer_instances: Annotated[
        Count,
        setting(
            "groups of replicas that each hold the optimiser's state completely: weights are gathered within a group, "
            "and gradients are summed over the groups by parts. 1: use_distributed_optimizer shards the state over all "
            "replicas. Not measured on a GPU",
            source=MEGATRON,
        ),
    ] = 1
    overlap_grad_reduce: Annotated[Flag, setting("reduce gradients while the backward pass runs", source=MEGATRON)] = (
        False
    )
    overlap_param_gather: Annotated[
        Flag,
        setting(
            "gather the new weights while the next forward pass runs; only for objective.name=sft, and with "
            "overlap_grad_reduce. Not measured on a GPU",
            source=MEGATRON,
        ),
    ] = False
    use_precision_aware_optimizer: Annotated[
        Flag,
        setting(
            "Transformer Engine's Adam keeps the main weights, and its moments in the types below. Not measured on a "
            "GPU",
            source=MEGATRON,
        ),
    ] = False
    main_grads_dtype: Annotated[
        Literal["fp32", "bf16"],
        setting(
            "type of the gradients that use_precision_aware_optimizer reads; only fp32 is accepted", source=MEGATRON
        ),
    ] = "fp32"
    main_params_dtype: Annotated[
        Literal["fp32", "fp16"],
        setting("type of the main weights with use_precision_aware_optimizer; only fp32 is accepted", source=MEGATRON),
    ] = "fp32"
    exp_avg_dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "fp8"],
        setting(
            "type of the first moment with use_precision_aware_optimizer; fp16 and fp8 are refused", source=MEGATRON
        ),
    ] = "fp32"
    exp_avg_sq_dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "fp8"],
        setting(
            "type of the second moment with use_precision_aware_optimizer; fp16 and fp8 are refused", source=MEGATRON
        ),
    ] = "fp32"
    optimizer_cpu_offload: Annotated[
        Flag,
        setting(
            "keep the optimiser's state in host memory and take its steps on the CPU; needs "
            "use_precision_aware_optimizer. Not measured on a GPU",
            source=MEGATRON,
        ),
    ] = False
    optimizer_offload_fraction: Annotated[
        Number,
        setting(
            "share of the weights whose state optimizer_cpu_offload moves; only 1 is accepted",
            source=MEGATRON_NAME,
            gt=0,
            le=1,
        ),
    ] = 1.0
    overlap_cpu_optimizer_d2h_h2d: Annotated[
        Flag,
        setting("optimizer_cpu_offload copies gradients and weights while it steps other weights", source=MEGATRON),
    ] = False
    pin_cpu_grads: Annotated[
        Flag, setting("optimizer_cpu_offload keeps its copy of the gradients in pinned memory", source=MEGATRON)
    ] = True
    cpu_offloading: Annotated[
        Flag,
        setting(
            "keep activations of the first cpu_offloading_num_layers layers in host memory between forward and "
            "backward pass. Not measured on a GPU",
            source=MEGATRON,
        ),
    ] = False
    cpu_offloading_num_layers: Annotated[
        Whole, setting("layers whose activations cpu_offloading moves: fewer than the model has", source=MEGATRON, ge=0)
    ] = 0
    transformer_impl: Annotated[
        Literal["auto", "local", "transformer_engine"],
        setting(
            "implementation of the layers; auto: Transformer Engine where it and CUDA are present",
            source=MEGATRON_NAME,
        ),
    ] = "auto"
    recompute_granularity: Annotated[
        Literal["full", "selective"] | None, setting("activations that are recomputed; null: none", source=MEGATRON)
    ] = None
    recompute_method: Annotated[
        Literal["uniform", "block"] | None,
        setting("how full recomputation divides the layers; no effect without it", source=MEGATRON),
    ] = None
    recompute_num_layers: Annotated[
        Count | None,
        setting(
            "uniform: layers in a recomputed unit; block: recomputed layers of a stage; no effect without full "
            "recomputation",
            source=MEGATRON,
        ),
    ] = None
    fp8: Annotated[
        Literal["e4m3", "hybrid"] | None,
        setting("FP8 format of Transformer Engine's matrix products; null: no FP8", source=MEGATRON),
    ] = None
    fp8_recipe: Annotated[
        Literal["delayed", "tensorwise", "blockwise", "mxfp8"], setting("FP8 scaling", source=MEGATRON_NAME)
    ] = "blockwise"
    fp8_emulate: Annotated[
        Flag,
        setting("emulate FP8's products in plain torch: slow, for experiments without a GPU that supports FP8"),
    ] = False
    fp8_margin: Annotated[Whole, setting("margin of delayed scaling", source=MEGATRON, ge=0)] = 0
    fp8_amax_history_len: Annotated[Count, setting("steps of history that delayed scaling keeps", source=MEGATRON)] = 1
    fp8_amax_compute_algo: Annotated[
        Literal["most_recent", "max"], setting("what delayed scaling takes from its history", source=MEGATRON)
    ] = "most_recent"
    first_last_layers_bf16: Annotated[Flag, setting("keep the first and last layers out of FP8", source=MEGATRON)] = (
        False
    )
    num_layers_at_start_in_bf16: Annotated[
        Whole, setting("first layers that first_last_layers_bf16 keeps out of FP8", source=MEGATRON, ge=0)
    ] = 1
    num_layers_at_end_in_bf16: Annotated[
        Whole, setting("last layers that first_last_layers_bf16 keeps out of FP8", source=MEGATRON, ge=0)
    ] = 1
    deterministic_mode: Annotated[Flag, setting("use only deterministic kernels", source=MEGATRON)] = False
    distributed_timeout_minutes: Annotated[
        Count | None,
        setting(
            "time limit of a collective, in minutes; null: 10 minutes and 20 times run.hang_timeout_s, so that the "
            "watchdog ends a hang first",
            source=MEGATRON_NAME,
        ),
    ] = None

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the routers of a mixture have a loss of their own."""
        return self.moe_router_load_balancing_type != "none" or self.moe_z_loss_coeff is not None

    @property
    def expert_parallel_ranks(self) -> int:
        """The ranks of a stage that together have all experts of a layer once."""
        return self.expert_model_parallel_size * (self.expert_tensor_parallel_size or self.tensor_model_parallel_size)
