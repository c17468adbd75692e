"""The decoder without `transformers` returns the text of the complete tokenizer, or is that tokenizer."""

import json

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.data import decoding
from megatron_paint.data.decoding import load_decoder
from megatron_paint.data.tokenizers import load_tokenizer
from tests.data.tokenizer_cases import QWEN3, needs_qwen3, write_byte_tokenizer, write_sentencepiece

ADDED = {"content": "<|more|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def check_same(folder):
    """Every id, runs of ids, and ids without a token."""
    tokenizer, decode = load_tokenizer(folder), load_decoder(folder)
    step = max(1, tokenizer.size // 500)
    ids = [*range(0, tokenizer.size, step), tokenizer.size - 1, tokenizer.size, tokenizer.size + 7, -1, 0]
    assert decode(ids) == tokenizer.decode(ids, keep_special=True)
    for index in ids:
        assert decode([index]) == tokenizer.decode([index], keep_special=True)
    assert decode([]) == ""


def test_a_byte_level_tokenizer(tmp_path, monkeypatch):
    folder = write_byte_tokenizer(tmp_path / "bytes")
    check_same(folder)
    monkeypatch.setattr(decoding, "load_tokenizer", None)
    assert load_decoder(folder)([0])


@needs_qwen3
def test_qwen3():
    check_same(QWEN3)


def test_a_sentencepiece_tokenizer(tmp_path):
    check_same(write_sentencepiece(tmp_path / "pieces"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"pad_token": "<|more|>"}),
        ("tokenizer_config.json", {"pad_token": {"__type": "AddedToken", **ADDED}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|more|>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"special": True, **ADDED}}}),
        ("special_tokens_map.json", {"pad_token": ADDED}),
        ("added_tokens.json", {"<|more|>": 400}),
    ],
)
def test_a_token_that_only_another_file_names(tmp_path, monkeypatch, file, content):
    """tokenizer.json alone would decode its id to U+FFFD, so the complete tokenizer decodes."""
    folder = write_byte_tokenizer(tmp_path / "bytes")
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    check_same(folder)
    asked = []
    monkeypatch.setattr(decoding, "load_tokenizer", lambda *_, **__: asked.append(1))
    load_decoder(folder)
    assert asked


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer.json nor tokenizer.model"):
        load_decoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_decoder(tmp_path)
