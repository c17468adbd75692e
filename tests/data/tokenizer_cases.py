"""Small tokenizers that the tests make, and the real one if the shared data folder exists."""

import io
import json
from pathlib import Path

import pytest

QWEN3 = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen3_tokenizer"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="the shared data folder is not beside the repository")

CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}
<think>

</think>

{% endif %}
{% endif %}"""
TEXTS = ["Let us solve x = 12 step by step.", "Problem: what is 3 + 4?", "the answer is \\boxed{7}"] * 30


def write_byte_tokenizer(folder, *, template=CHATML, config=None):
    """Writes a byte-level BPE tokenizer with Qwen3's control tokens, as `transformers` saves it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    values |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(values if config is None else config))
    return folder


def write_sentencepiece(folder, *, template=CHATML, **options):
    """Writes a byte-fallback SentencePiece model with the same control tokens."""
    import sentencepiece

    model = io.BytesIO()
    arguments = {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "control_symbols": ["<|im_start|>", "<|im_end|>"],
        "user_defined_symbols": ["<think>", "</think>"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "pad_id": 3,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **(arguments | options))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder
