"""Settings of Megatron-Core that do not exist here, and why: the error for such a key prints the reason."""

from types import MappingProxyType

_FINE_GRAINED = (
    "belongs to Megatron's fine-grained offloading of activations, which is not supported: it replays the order of "
    "micro-batches of the first step, and here each step has another number of them. "
    "megatron.cpu_offloading moves complete layers"
)
_CUDA_GRAPHS = (
    "is not supported: a step of training has micro-batches of many lengths. rollout.cuda_graphs captures the decoding "
    "of samples"
)
_MESSAGES_OF_STAGES = (
    "is chosen by the program: with two stages and virtual_pipeline_model_parallel_size, Megatron's default mixes up "
    "the messages of the two directions"
)
_FULLY_SHARDED = (
    "belongs to Megatron-FSDP, which is not supported: it needs CUDA, and was not tried. "
    "megatron.use_distributed_optimizer shards the optimiser's state"
)
NOT_SUPPORTED = MappingProxyType(
    {
        "megatron.moe_token_dispatcher_type": (
            "is always alltoall: allgather needs the same number of tokens on every replica, and flex needs further "
            "packages"
        ),
        "megatron.moe_expert_capacity_factor": (
            "is not supported: it drops tokens, so what a token gets would depend on the other tokens of its "
            "micro-batch. No token is dropped here"
        ),
        "megatron.moe_grouped_gemm": (
            "follows from megatron.transformer_impl: Transformer Engine's layers compute all experts of a rank in one "
            "call, and plain torch's compute one after another"
        ),
        "megatron.moe_router_dtype": "is always fp32",
        "megatron.overlap_p2p_comm": _MESSAGES_OF_STAGES,
        "megatron.batch_p2p_comm": _MESSAGES_OF_STAGES,
        "megatron.use_megatron_fsdp": _FULLY_SHARDED,
        "megatron.data_parallel_sharding_strategy": _FULLY_SHARDED,
        "megatron.fine_grained_activation_offloading": _FINE_GRAINED,
        "megatron.offload_modules": _FINE_GRAINED,
        "megatron.activation_offload_fraction": _FINE_GRAINED,
        "megatron.min_offloaded_tensor_size": _FINE_GRAINED,
        "megatron.cpu_offloading_weights": "is not supported: newer versions of Transformer Engine ignore it",
        "megatron.cpu_offloading_retain_pinned_cpu_buffers": (
            "is not supported: it needs micro-batches of one shape, and here each has another number of tokens"
        ),
        "megatron.store_param_remainders": (
            "is not supported: a checkpoint of any layout needs complete main weights, and Megatron cannot load the "
            "halves that it would save"
        ),
        "megatron.use_torch_optimizer_for_cpu_offload": "is not supported: Megatron-Core reads it and does not use it",
        "megatron.pin_cpu_params": "is not supported: Megatron-Core always pins these weights",
        "megatron.cuda_graph_impl": _CUDA_GRAPHS,
        "megatron.enable_cuda_graph": _CUDA_GRAPHS,
        "megatron.reduce_scatter_with_fp32_accumulation": "is not needed: gradients are reduced in float32",
    }
)
