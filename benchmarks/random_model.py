"""Makes the Qwen3 of random weights that the benchmarks measure."""

import torch


def make_model(folder: str, *, vocabulary: int, layers: int, positions: int = 2048) -> None:
    """Writes a Hugging Face folder with hidden size 512 and tied embeddings. positions: the longest row."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_full_vocabulary_model(folder: str, *, spread: float) -> None:
    """Writes a Hugging Face folder of 42 million weights with Qwen3's vocabulary and tied embeddings.

    spread: the standard deviation of its logits, which decides how many tokens a nucleus has.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        # With usual random weights and tied embeddings, a model repeats its last token.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 50
            layer.mlp.down_proj.weight *= 50
        model.model.norm.weight.fill_(spread / (config.initializer_range * config.hidden_size**0.5))
    model.save_pretrained(folder)
