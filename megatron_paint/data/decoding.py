"""Ids to text without `transformers`, whose import takes seconds: for commands that only show responses."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_paint.data.tokenizers import UNKNOWN_ID_TEXT, load_tokenizer

Decode = Callable[[Sequence[int]], str]
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # they may add tokens


def load_decoder(folder: str | Path, *, chat_template: str | None = None) -> Decode:
    """The decoder of the tokenizer in a folder. Special tokens become text, and an id without a token becomes U+FFFD.

    The same text as `load_tokenizer(folder).decode(ids, keep_special=True)`. It comes from that function where
    tokenizer.json does not define every token. Errors: as load_tokenizer, which also describes `chat_template`.
    """
    folder = Path(folder)
    backend = _load_complete_backend(folder)
    if backend is None:
        tokenizer = load_tokenizer(folder, chat_template=chat_template)
        return lambda ids: tokenizer.decode(ids, keep_special=True)
    size = backend.get_vocab_size(with_added_tokens=True)

    def decode(ids: Sequence[int]) -> str:
        pieces = []
        for known, group in groupby(ids, key=lambda index: 0 <= index < size):
            run = list(group)
            pieces.append(backend.decode(run, skip_special_tokens=False) if known else UNKNOWN_ID_TEXT * len(run))
        return "".join(pieces)

    return decode


def _load_complete_backend(folder: Path) -> Any:
    """The tokenizer of tokenizer.json; None where it is missing or broken, or where other files name more tokens."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        named = [token for name in CONFIGS for token in _tokens_in(folder / name)]
    except Exception:  # the Rust library raises bare Exception; load_tokenizer finds out what is wrong
        return None
    return backend if all(backend.token_to_id(token) is not None for token in named) else None


def _tokens_in(file: Path) -> Iterator[str]:
    """The tokens that a configuration file names."""
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "added_tokens.json":
        yield from content
        return
    for key, value in content.items():
        if key == "added_tokens_decoder" or key.endswith("special_tokens"):
            entries = value.values() if isinstance(value, dict) else value or []
        else:
            entries = [value] if key.endswith("_token") else []
        for entry in entries:
            token = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(token, str):
                yield token
