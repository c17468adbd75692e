"""Tokenizers behind one small interface: Hugging Face fast tokenizers and SentencePiece models.

Ids are plain tuples of int. In training, only prompts.py uses this module.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatron_paint.base.errors import UserError
from megatron_paint.data.turns import Message, TurnMarks, read_turn_marks, stop_ids
from megatron_paint.records import TokenIds

OffsetList = tuple[tuple[int, int], ...]  # start and end of each token, in characters

UNKNOWN_ID_TEXT = "\ufffd"  # text of an id without a token; a model may have more rows than its tokenizer has tokens
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class Tokenizer(Protocol):
    """The interface of a tokenizer that the trainer needs."""

    # Ids that end a response. They are one and the same action: compare and count them together. The first one is the
    # token with which the chat template closes an answer, or eos where it closes with none.
    stop_ids: TokenIds
    turns: TurnMarks  # how the chat template marks turns
    notes: tuple[str, ...]  # what a user should know about the end of responses
    pad_id: int
    size: int  # number of tokens, including added ones; a model may have more rows
    control_tokens: Mapping[str, int]  # strings that `encode` turns into one control id each
    special_tokens: frozenset[str]  # those of them that are special; <think> of Qwen3 is not

    def encode(self, *parts: str) -> TokenIds:
        """Returns the ids of the text and adds none. A control token that is written in the text becomes its id.

        Several parts are encoded one after the other, so no control token appears across a seam. Raises UserError for
        a lone surrogate.
        """

    def encode_with_offsets(self, text: str) -> tuple[TokenIds, OffsetList]:
        """Returns the ids of the text, and start and end of each id in characters."""

    def decode(self, ids: Sequence[int], keep_special: bool) -> str:
        """Returns the text of the ids, with U+FFFD for an id without a token. It never raises."""

    def render_chat(self, messages: Sequence[Message], thinking: bool, add_generation_prompt: bool = True) -> str:
        """Renders the messages with the chat template, which gets `thinking` as `enable_thinking`.

        Raises UserError if the template fails.
        """


def load_tokenizer(folder: str | Path, *, chat_template: str | None = None) -> Tokenizer:
    """Loads a folder's tokenizer: tokenizer.json (or vocab.json and merges.txt), or SentencePiece's tokenizer.model.
    chat_template: path of a Jinja file that replaces the tokenizer's template. Raises UserError if files are missing or
    broken, if there is no chat template, or if no token ends a response.
    """
    folder = Path(folder)
    template = None if chat_template is None else read_template(chat_template, setting="prompts.chat_template")
    if not folder.is_dir():
        raise UserError(f"model.hf_path: there is no folder {folder}; name the folder that holds tokenizer.json")
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return HuggingFaceTokenizer(folder, template)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder, template)
    files = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "no files"
    raise UserError(
        f"model.hf_path: {folder} has neither tokenizer.json nor tokenizer.model (it has {files}); copy the tokenizer"
        " files of the checkpoint there"
    )


def read_template(path: str | Path, *, setting: str) -> str:
    """Returns the text of a template file. Raises UserError that names the setting if the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}: {path} cannot be read as a UTF-8 text file ({error})") from error


class HuggingFaceTokenizer:
    """A fast tokenizer of `transformers`."""

    def __init__(self, folder: Path, chat_template: str | None):
        self._tokenizer = _load_fast_tokenizer(folder)
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._chat_template = chat_template
        if chat_template is None and not self._tokenizer.chat_template:
            raise _no_chat_template(folder)
        self.size = len(self._tokenizer)
        added = self._tokenizer.added_tokens_decoder
        self.control_tokens = {
            str(token): index for index, token in added.items() if token.special or _TAG.fullmatch(str(token))
        }
        self.special_tokens = frozenset(str(token) for token in added.values() if token.special)
        self.turns = _turn_marks(self)
        pad = self._tokenizer.pad_token_id
        self.stop_ids = stop_ids(
            folder,
            turn_end=self.control_tokens.get(self.turns.end),
            eos=self._tokenizer.eos_token_id,
            pad=pad,
            is_token=lambda index: 0 <= index < 2**31 and self._backend.id_to_token(index) is not None,
        )
        self.pad_id = self.stop_ids[0] if pad is None else pad
        self.notes = _notes(self, self._tokenizer.eos_token_id)

    def encode(self, *parts: str) -> TokenIds:
        ids: list[int] = []
        for part in parts:
            ids += self._encode(part).ids
        return tuple(ids)

    def encode_with_offsets(self, text: str) -> tuple[TokenIds, OffsetList]:
        encoding = self._encode(text)
        return tuple(encoding.ids), tuple(encoding.offsets)

    def decode(self, ids: Sequence[int], keep_special: bool) -> str:
        pieces = []
        for known, run in _runs(ids, self.size):
            if not known:
                pieces.append(UNKNOWN_ID_TEXT * len(run))
            else:
                pieces.append(self._backend.decode(run, skip_special_tokens=not keep_special))
        return "".join(pieces)

    def render_chat(self, messages: Sequence[Message], thinking: bool, add_generation_prompt: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=thinking,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(f"the chat template cannot be rendered ({error}); set prompts.chat_template") from error

    def _encode(self, text: str) -> Any:
        _check_encodable(text)
        return self._backend.encode(text, add_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece model and its chat_template.jinja.

    The model's dummy prefix is used at the start of a text, and not after a control token or a seam.
    """

    def __init__(self, folder: Path, chat_template: str | None):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UserError(
                f"{folder}/tokenizer.model needs the package sentencepiece: pip install sentencepiece"
            ) from error

        try:
            self._model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            # In a protocol buffer the last value of a field wins. This one is normalizer_spec.add_dummy_prefix = false.
            model = (folder / "tokenizer.model").read_bytes()
            self._inner_model = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}/tokenizer.model is not a SentencePiece model ({error})") from error
        if chat_template is None:
            if not (folder / "chat_template.jinja").is_file():
                raise _no_chat_template(folder)
            chat_template = read_template(folder / "chat_template.jinja", setting="chat template")
        self._template_source = chat_template
        self.size = self._model.get_piece_size()
        self.control_tokens = self._find_control_tokens()
        self.special_tokens = frozenset(t for t, index in self.control_tokens.items() if self._model.is_control(index))
        self.turns = _turn_marks(self)
        eos, pad = self._model.eos_id(), self._model.pad_id()
        self.stop_ids = stop_ids(
            folder,
            turn_end=self.control_tokens.get(self.turns.end),
            eos=eos if eos >= 0 else None,
            pad=pad if pad >= 0 else None,
            is_token=lambda index: 0 <= index < self.size,
        )
        self.pad_id = pad if pad >= 0 else self.stop_ids[0]
        self.notes = _notes(self, eos)

    def encode(self, *parts: str) -> TokenIds:
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += [index for index, _ in self._encode(part, at_start=number == 0)]
        return tuple(ids)

    def encode_with_offsets(self, text: str) -> tuple[TokenIds, OffsetList]:
        encoded = self._encode(text, at_start=True)
        return tuple(index for index, _ in encoded), tuple(offsets for _, offsets in encoded)

    def decode(self, ids: Sequence[int], keep_special: bool) -> str:
        pieces: list[str] = []
        model = self._model
        for known, run in _runs(ids, self.size):
            if not known:
                pieces.append(UNKNOWN_ID_TEXT * len(run))
                continue
            text: list[int] = []
            for index in [*run, None]:
                if index is not None and not self._model.is_control(index):
                    text.append(index)
                    continue
                if text:
                    pieces.append(model.decode(text))
                    text = []
                if index is not None and keep_special:
                    pieces.append(self._model.id_to_piece(index))
                model = self._inner_model
        return "".join(pieces)

    def render_chat(self, messages: Sequence[Message], thinking: bool, add_generation_prompt: bool = True) -> str:
        def piece(index: int) -> str:
            return self._model.id_to_piece(index) if index >= 0 else ""

        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                enable_thinking=thinking,
                bos_token=piece(self._model.bos_id()),
                eos_token=piece(self._model.eos_id()),
            )
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(f"the chat template cannot be rendered ({error}); set prompts.chat_template") from error

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self._template_source)

    @cached_property
    def _control_pattern(self) -> re.Pattern:
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def _find_control_tokens(self) -> dict[str, int]:
        tokens = {}
        for index in range(self.size):
            piece = self._model.id_to_piece(index)
            if self._model.is_control(index) or (_TAG.fullmatch(piece) and not self._model.is_byte(index)):
                tokens[piece] = index
        tokens.pop(self._model.id_to_piece(self._model.unk_id()), None)
        return tokens

    def _encode(self, text: str, *, at_start: bool) -> list[tuple[int, tuple[int, int]]]:
        """Returns ids with their character ranges. The model encodes the pieces between control tokens."""
        _check_encodable(text)
        encoded = []
        at = 0
        for piece in self._control_pattern.split(text) if self.control_tokens else [text]:
            if piece in self.control_tokens:
                encoded.append((self.control_tokens[piece], (at, at + len(piece))))
            elif piece:
                model = self._model if at_start and at == 0 else self._inner_model
                encoded += _with_characters(model.encode(piece, out_type="serialized_proto"), piece, at)
            at += len(piece)
        return encoded


def _with_characters(proto: bytes, text: str, at: int) -> list[tuple[int, tuple[int, int]]]:
    """Returns ids and character ranges, counted from `at`, of a serialised SentencePieceText with byte positions."""
    character_at = [at + index for index, letter in enumerate(text) for _ in letter.encode()]
    character_at.append(at + len(text))
    pieces = []
    for field, value in _fields(proto):
        if field == 2:  # pieces { id = 2, begin = 4, end = 5 }
            piece = dict(_fields(value))
            pieces.append((piece.get(2, 0), (character_at[piece.get(4, 0)], character_at[piece.get(5, 0)])))
    return pieces


def _fields(proto: bytes) -> list[tuple[int, Any]]:
    """Returns field numbers and values of a protocol buffer of integers and byte strings."""
    fields = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = proto[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(proto):
        tag = number()
        value: Any = number()
        if tag & 7 == 2:
            at += value
            value = proto[at - value : at]
        fields.append((tag >> 3, value))
    return fields


def _load_fast_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer may rebuild the pipeline from its code. The model was trained with tokenizer.json.
    loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"model.hf_path: the tokenizer in {folder} cannot be loaded ({error})") from error
    if not tokenizer.is_fast:
        raise UserError(f"model.hf_path: {folder} has only a slow tokenizer; save it with its tokenizer.json")
    return tokenizer


def _turn_marks(tokenizer: "HuggingFaceTokenizer | SentencePieceTokenizer") -> TurnMarks:
    return read_turn_marks(
        lambda messages, generates: tokenizer.render_chat(messages, True, add_generation_prompt=generates),
        special=tokenizer.special_tokens,
        tags=tokenizer.control_tokens,  # an added token of white space ends no turn
    )


def _notes(tokenizer: Tokenizer, eos: int | None) -> tuple[str, ...]:
    """What is unusual about the end of a response."""
    ends = " or ".join(tokenizer.decode([index], keep_special=True) for index in tokenizer.stop_ids)
    turns = tokenizer.turns
    if turns.end is None:
        first = tokenizer.decode(tokenizer.stop_ids[:1], keep_special=True)
        return (f"{turns.why_no_end}: a response ends with {ends}, and SFT ends each solution with {first}",)
    if eos is not None and tokenizer.stop_ids[0] != eos:
        named = tokenizer.decode([eos], keep_special=True)
        return (
            f"the chat template closes an answer with {turns.end}, and eos_token is {named}: a response ends with "
            f"{ends}, and SFT ends each solution with {turns.end}. A program that serves the exported model needs "
            f"{turns.end} as a stop token",
        )
    return ()


def _runs(ids: Sequence[int], size: int) -> list[tuple[bool, list[int]]]:
    """Cuts the ids into runs of ids with a token and runs of ids without one."""
    runs: list[tuple[bool, list[int]]] = []
    for index in ids:
        known = 0 <= index < size
        if not runs or runs[-1][0] != known:
            runs.append((known, []))
        runs[-1][1].append(index)
    return runs


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text to encode has a lone surrogate (\\u{ord(text[error.start]):04x}) at character {error.start};"
            " remove it, because it is no character"
        ) from error


def _no_chat_template(folder: Path) -> UserError:
    return UserError(
        f"prompts.chat_template is null and the tokenizer in {folder} has no chat template (neither in"
        " tokenizer_config.json nor as chat_template.jinja); name a template file"
    )
