"""Builds the model on Megatron-Core, with plain torch layers or with Transformer Engine's."""

from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import ModelSettings
from megatron_paint.mcore.attention import LocalAttention, transformer_engine_attention
from megatron_paint.mcore.fp8_emulation import emulate_fp8
from megatron_paint.mcore.ranks import Ranks, is_expert
from megatron_paint.mcore.rotary import attention_scale, inverse_frequencies
from megatron_paint.mcore.stage import Chunk, Stage
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.hardware import use_transformer_engine
from megatron_paint.planning.stages import DIVIDING, FIRST, LAST, chunks_a_stage, split_layers

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class LocalRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight supports sequence parallelism; Megatron's local norm does not."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def transformer_config(shape: ModelShape, model: ModelSettings, megatron: MegatronSettings) -> TransformerConfig:
    """Megatron's description of the model: the shape plus the settings under `megatron:`."""
    dtype = DTYPES[model.dtype]
    with_engine = use_transformer_engine(megatron)
    optional = {
        **_recomputation(megatron),
        **(_expert_settings(shape, megatron) if shape.num_experts else {}),
        **_pipeline_settings(megatron),
    }
    if megatron.cpu_offloading:
        optional |= {name: getattr(megatron, name) for name in ("cpu_offloading", "cpu_offloading_num_layers")}
    if megatron.fp8 is not None and not megatron.fp8_emulate:
        names = ("fp8", "fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
        names += ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        optional |= {name: getattr(megatron, name) for name in names}
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        softmax_scale=attention_scale(shape),
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        context_parallel_size=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel and megatron.tensor_model_parallel_size > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # Megatron refuses its default with variable lengths
        deterministic_mode=megatron.deterministic_mode,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Every weight is read from a checkpoint before it is used.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=with_engine,
        bias_activation_fusion=with_engine,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        calculate_per_token_loss=True,
        **{name: value for name, value in optional.items() if value is not None},
    )


def _recomputation(megatron: MegatronSettings) -> dict:
    """Megatron refuses the method and the number of layers with selective recomputation, which has no use for them."""
    granularity = {"recompute_granularity": megatron.recompute_granularity}
    if megatron.recompute_granularity != "full":
        return granularity
    return granularity | {name: getattr(megatron, name) for name in ("recompute_method", "recompute_num_layers")}


def _pipeline_settings(megatron: MegatronSettings) -> dict:
    """The layers of each stage, and how chunks of a virtual pipeline exchange tensors.

    Megatron's default, batched sends and receives, mixes up the two directions between two stages that are each other's
    next and previous stage: training is wrong, without an error where the lengths are equal (0.16.1 and 0.19.2).
    """
    found = {name: getattr(megatron, name) for name in DIVIDING}
    if megatron.pipeline_model_parallel_size == 2 and found[FIRST] is not None:
        found[LAST] = None  # it follows; with both and chunks, Megatron divides by the number of stages between them: 0
    if (chunks := chunks_a_stage(megatron)) > 1:
        found |= {"virtual_pipeline_model_parallel_size": chunks, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    return found


def _expert_settings(shape: ModelShape, megatron: MegatronSettings) -> dict:
    """The router: float32 softmax over the chosen experts, or over all if not normalised. No token is dropped."""
    return {
        "expert_model_parallel_size": megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": (megatron.expert_tensor_parallel_size or megatron.tensor_model_parallel_size),
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_router_pre_softmax": not shape.normalise_experts,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": megatron.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": megatron.moe_aux_loss_coeff,
        "moe_z_loss_coeff": megatron.moe_z_loss_coeff,
        "moe_grouped_gemm": use_transformer_engine(megatron),
    }


def layer_spec(*, with_engine: bool, lora: bool, num_experts: int = 0) -> ModuleSpec:
    """One layer. Transformer Engine fuses the norms into the linear layers unless adapters need them."""
    qkv, proj, fc1, fc2, norm, attention = _parts(with_engine, fuse_norms=not lora)
    fused = with_engine and not lora
    layer_norm = IdentityOp if fused else norm
    mlp = _mlp(MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2))
    keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    if num_experts:
        mlp = get_moe_module_spec(use_te=with_engine, num_experts=num_experts, moe_grouped_gemm=with_engine)
        del keys_map["pre_mlp_layernorm."]  # the router reads its output too, so it is never fused
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layer_norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv, core_attention=attention, linear_proj=proj, q_layernorm=norm, k_layernorm=norm
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm if num_experts else layer_norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # Checkpoints always use the fused names, so that both kinds of layers can load them.
            sharded_state_dict_keys_map=keys_map,
        ),
    )


def _mlp(submodules: MLPSubmodules):
    if hasattr(MLP, "as_mlp_submodule"):  # megatron-core 0.19 expects a builder, 0.16 a spec
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def _parts(with_engine: bool, *, fuse_norms: bool) -> tuple:
    if not with_engine:
        column, row = ColumnParallelLinear, RowParallelLinear
        return column, row, column, row, LocalRMSNorm, LocalAttention
    from megatron.core.extensions import transformer_engine as engine

    column = engine.TELayerNormColumnParallelLinear if fuse_norms else engine.TEColumnParallelLinear
    row = engine.TERowParallelLinear
    return column, row, column, row, engine.TENorm, transformer_engine_attention()


def build_model(shape: ModelShape, model: ModelSettings, megatron: MegatronSettings, ranks: Ranks) -> Stage:
    """This rank's stage and shard on its device; its weights are not filled yet."""
    config = transformer_config(shape, model, megatron)
    with_engine = use_transformer_engine(megatron)
    spec = layer_spec(with_engine=with_engine, lora=model.lora is not None, num_experts=shape.num_experts)
    split = split_layers(shape, megatron)
    chunks = [
        _build_chunk(config, spec, number, layers, split.chunks, shape, ranks)
        for number, layers in enumerate(split.layers[ranks.pp_rank])
    ]
    stage = Stage(chunks, shape)
    _mark_sharded_weights(stage)
    for chunk in chunks:
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(ranks.device)
        chunk.to(ranks.device)
    if megatron.fp8_emulate:
        emulate_fp8(stage, megatron)
    return stage


def _build_chunk(
    config: TransformerConfig,
    spec: ModuleSpec,
    number: int,
    layers: range,
    chunks: int,
    shape: ModelShape,
    ranks: Ranks,
) -> Chunk:
    """The chunk of this number, of `chunks` on each stage. layers: their indices in the complete model."""
    virtual = number if chunks > 1 else None
    layer_norm = spec.submodules.self_attention.submodules.q_layernorm
    chunk = Chunk(
        config,
        TransformerBlockSubmodules(layer_specs=[spec] * len(layers), layer_norm=layer_norm),
        vocab_size=ranks.tp_size * shape.vocab_rows(ranks.tp_size),
        max_sequence_length=shape.max_positions,
        pre_process=ranks.is_first_stage and number == 0,
        post_process=ranks.is_last_stage and number == chunks - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        vp_stage=virtual,
    )
    # Checkpoints and FP8 go by Megatron's numbers of the layers, which Megatron does not compare with their count.
    built = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    wanted = get_num_layers_to_build(config, vp_stage=virtual, pp_rank=ranks.pp_rank)
    if built != list(layers) or len(built) != wanted:
        raise AssertionError(
            f"stage {ranks.pp_rank}, chunk {number}: layers {built}, planned {layers}, Megatron {wanted}"
        )
    return chunk


def _mark_sharded_weights(stage: Stage) -> None:
    """Marks the weights that are shards, for the gradient norm: Megatron marks only weights that it initialises.

    A weight of an expert always counts as a shard: no other rank of its optimiser's group has it. The gradient norm of
    megatron-core 0.16 would otherwise leave out those on tensor-parallel ranks above 0.
    """
    split_dims = {"linear_qkv": 0, "linear_fc1": 0, "word_embeddings": 0, "output_layer": 0}
    split_dims |= {"linear_proj": 1, "linear_fc2": 1}
    for name, parameter in stage.named_parameters():
        *_, module, kind = name.split(".")
        if is_expert(name):
            mark_expert(parameter, dim=split_dims[module])
        elif kind == "weight" and module in split_dims and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=split_dims[module], stride=1)


def mark_expert(parameter: torch.nn.Parameter, *, dim: int) -> None:
    """Marks a parameter of an expert. They then have separate gradient buffers and a separate optimiser.

    Megatron does that only for expert-parallel sizes above 1. Without it, 0.16.1 does not sum the gradient over the
    tensor-parallel ranks if an expert is on one of them, and a checkpoint of size 1 does not load at size 2.
    """
    parameter.allreduce = False
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1
