"""One process on one GPU, and a small model for it."""

import pytest
import torch


@pytest.fixture(scope="session")
def ranks():
    """One process, one GPU."""
    from megatron_paint.config.megatron import MegatronSettings
    from megatron_paint.mcore.ranks import start_ranks, stop_ranks

    yield start_ranks(MegatronSettings())
    stop_ranks()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small Qwen3 with head size 128, which Transformer Engine's kernels want."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path
