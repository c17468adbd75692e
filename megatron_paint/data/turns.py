"""The end of an assistant's turn: the token with which the chat template closes it, and all ids that end a response."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.grading.thoughts import THINK_END, THINK_START
from megatron_paint.records import TokenIds

Message = Mapping[str, str]  # {"role": ..., "content": ...}

QUESTION, ANSWER, NEXT_QUESTION = "QuestionProbe", "AnswerProbe", "NextProbe"  # texts that no template contains


@dataclass(frozen=True, kw_only=True)
class TurnMarks:
    """How a chat template marks turns, as it was seen in rendered conversations."""

    end: str | None = None  # the token that closes an assistant's turn; None: no token does
    before_end: str = ""  # what the template writes between an answer and `end`
    why_no_end: str = ""  # the reason if `end` is None
    markers: frozenset[str] = frozenset()  # tokens around turns: `end`, and those before a user's message


def read_turn_marks(
    render: Callable[[Sequence[Message], bool], str], *, special: Collection[str], tags: Collection[str]
) -> TurnMarks:
    """Renders an answer with the chat template and finds the token that closes it.

    render: returns the conversation as text; its second argument is `add_generation_prompt`. special: strings that are
    one special token. tags: strings that are one other added token and look like a tag; a special token is preferred.
    A template may close only a turn that another one follows, or refuse a conversation that ends with an answer: then
    the answer between two questions counts. If the template refuses every answer, the token that closes a question
    counts: templates that write the generation prompt separately close every turn with the same token. A token that
    begins a user's turn never closes one.
    """
    names = {*special, *tags} - {THINK_START, THINK_END}  # a thought's tags close no turn
    tokens = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    asked = _rendered(render, [question])
    opening, after_question = _cut(asked, QUESTION) or ("", "")
    openers = _openers(opening, tokens)
    markers = {*tokens.findall(opening)}
    closings = []
    for conversation in ([question, answer], [question, answer, {"role": "user", "content": NEXT_QUESTION}]):
        if cut := _cut(_rendered(render, conversation), ANSWER):
            before, after = cut
            markers |= {*tokens.findall((_cut(before, QUESTION) or ("", ""))[0])}
            closings.append((_cut(after, NEXT_QUESTION) or (after, ""))[0])
    why = "the chat template cannot render an answer"
    if closings:
        spelled = "" if tokens.search(closings[0]) else closings[0].strip()
        how = f"{spelled!r}, which is not one token" if spelled else "no token"
        why = f"the chat template closes an answer with {how}"
    elif len(_rendered(render, [question], generates=True)) > len(asked):
        closings.append(after_question)
    for closing in closings:
        there = list(tokens.finditer(closing))
        first_opener = next((number for number, match in enumerate(there) if match[0] in openers), len(there))
        there = there[:first_opener]
        end = next((match for match in there if match[0] in special), there[0] if there else None)
        if end is not None:
            return TurnMarks(end=end[0], before_end=closing[: end.start()], markers=frozenset({end[0], *markers}))
    return TurnMarks(why_no_end=why, markers=frozenset(markers))


def stop_ids(
    folder: Path, *, turn_end: int | None, eos: int | None, pad: int | None, is_token: Callable[[int], bool]
) -> TokenIds:
    """Returns all ids that end a response: the turn's end, eos, those of generation_config.json, and padding.

    Padding is one of them because no response contains it. is_token: tells whether the tokenizer has a token of an id.
    Raises UserError if nothing ends a response, and if generation_config.json names something that is no token.
    """
    stop = [index for index in (turn_end, eos) if index is not None]
    stop += _ids_in(folder / "generation_config.json", is_token)
    if not stop:
        raise UserError(
            f"model.hf_path: the tokenizer in {folder} names no eos_token, and its chat template closes an answer with "
            "no token, so no response could ever end; set eos_token in tokenizer_config.json"
        )
    if pad is not None:
        stop.append(pad)
    return tuple(dict.fromkeys(stop))


def _rendered(
    render: Callable[[Sequence[Message], bool], str], messages: Sequence[Message], *, generates: bool = False
) -> str:
    """The conversation as text; "" if the template refuses it. A broken template is reported at the first prompt."""
    try:
        return render(messages, generates)
    except UserError:
        return ""


def _cut(text: str, message: str) -> tuple[str, str] | None:
    """The text before and after the last occurrence of a message; a template may change its case. None without it."""
    places = list(re.finditer(re.escape(message), text, re.IGNORECASE))
    return (text[: places[-1].start()], text[places[-1].end() :]) if places else None


def _openers(opening: str, tokens: re.Pattern) -> set[str]:
    """The tokens that begin a user's turn: the last one before the message, and one before the name of the role."""
    there = list(tokens.finditer(opening))
    openers = {match[0] for match in there[-1:]}
    if len(there) > 1 and opening[there[-2].end() : there[-1].start()].strip().isalpha():
        openers.add(there[-2][0])
    return openers


def _ids_in(path: Path, is_token: Callable[[int], bool]) -> list[int]:
    """`eos_token_id` of generation_config.json, as a list."""
    if not path.is_file():
        return []
    try:
        named: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a JSON object ({error})") from error
    ids = [] if named is None else named if isinstance(named, list) else [named]
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, int) or not is_token(index):
            wrong = "is no id of the tokenizer" if type(index) is int else "is no whole number"
            raise UserError(
                f"{path}: eos_token_id is {json.dumps(named)}, and {json.dumps(index)} {wrong}; write the id of the "
                "token, or a list of ids"
            )
    return ids
