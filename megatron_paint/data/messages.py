"""Reads a problem that is written as a list of chat messages."""

import json
import re
from collections.abc import Sequence
from typing import Any

from megatron_paint.base.counts import count_text

TURN_KEYS = {"role", "content"}
PRINTED_MESSAGES = re.compile(r"\s*\[\{'(?:role|content)': ")


def is_messages(value: Any) -> bool:
    """Tells whether a value is a list of objects, as chat messages are."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def messages_in(text: str) -> list[Any] | None:
    """Returns the messages that a text holds as JSON; None for any other text.

    Raises ValueError for messages that are written as Python prints them, as in a CSV file that pandas wrote.
    """
    if PRINTED_MESSAGES.match(text):
        raise ValueError("holds printed messages; save the rows as JSON lines or Parquet, which keep lists")
    if not text.lstrip().startswith("[{") or '"role"' not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if is_messages(value) and all("role" in entry for entry in value) else None


def read_messages(messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Returns the text of the one user message, and that of a system message before it or an empty text.

    Raises ValueError with the reason if the messages are another conversation than that.
    """
    if missing := [message for message in messages if not message.keys() >= TURN_KEYS]:
        raise ValueError(f"holds a list of objects with {', '.join(sorted(missing[0]))}, not messages (role, content)")
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"holds {count_text(len(roles), 'message')} ({', '.join(map(str, roles))}); a problem is one user message, "
            "with no other message except a system message before it"
        )
    texts = [_text_of(message["content"]) for message in messages]
    return texts[-1], texts[0] if len(texts) > 1 else ""


def _text_of(content: Any) -> str:
    """Returns the text of a message, which may be a list of one text part."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text") if content[0].get("type") == "text" else content
    if not isinstance(content, str):
        raise ValueError("holds a message whose content is not one text")
    return content
