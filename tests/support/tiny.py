"""A tiny Qwen3 folder with a byte tokenizer and Qwen3's chat markers, and problems for it."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
ROWS = 264  # 256 bytes, the markers, and rows that no token has
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_model(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    positions: int = 1024,
    rows: int = ROWS,
    head_dim: int = 8,
    **sizes: int,
) -> Path:
    """Writes a Hugging Face folder of a random model that fits TP 2 and PP 2; with num_experts, of a mixture."""
    torch.manual_seed(seed)
    mixture = "num_experts" in sizes
    config = (Qwen3MoeConfig if mixture else Qwen3Config)(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=258,
        pad_token_id=256,
        **sizes,
    )
    (Qwen3MoeForCausalLM if mixture else Qwen3ForCausalLM)(config).save_pretrained(folder)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


def make_problems(path: Path, count: int = 8) -> Path:
    """Writes problems whose solutions have several sentences and a box."""
    rows = [
        {
            "id": f"p{i}",
            "problem": f"What is {i + 3} + {i + 5}?",
            "solution": f"We add {i + 3} and {i + 5}. This gives {2 * i + 8}.\nSo it is \\boxed{{{2 * i + 8}}}.",
            "answer": str(2 * i + 8),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_settings(folder: Path, model: Path, problems: Path, *, layout: str = "") -> Path:
    """Writes a settings file of a short run; `layout` goes under `megatron:`."""
    path = folder / "settings.yaml"
    path.write_text(
        f"""\
model: {{hf_path: {model}, dtype: float32}}
data: {{train: {problems}, problems_per_step: 4, micro_batch_tokens: 1200}}
prompts: {{teacher_thinking: false}}
objective: {{loss: {{fraction: 0.2}}}}
rollout: {{max_new_tokens: 8, temperature: 1.0, top_p: 1.0, top_k: 0}}
optimizer: {{lr: 1e-3, clip_grad: 1.0}}
megatron: {{{layout}}}
evaluation: {{problems: {problems}, limit: 3, samples: 2, max_new_tokens: 8, thinking: false, greedy: true}}
run: {{dir: {folder / "run"}, steps: 4, save_every: 2, evaluate_every: 2}}
"""
    )
    return path
