"""One complete settings file with comments from a preset and its bases.

The values are those that `config.load` reads from the preset. The comments are those of all files of the chain; where
two files comment on the same setting, the comment of the preset that is nearer to the user remains.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from megatron_paint.config.examples import preset_file
from megatron_paint.config.load import merged_trees

WIDTH = 118
COMMAND = re.compile(r"#   +")  # a header line with three spaces is a command to copy
ABOUT_THE_BASE = "The base holds the recipe and explains it. "
PRESET = re.compile(r"examples/\S+\.yaml")
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w]+):(?P<rest>.*)")


@dataclass
class PresetFile:
    """One file of the chain: its header, its values and the comments of its settings."""

    header: str  # its first paragraph, without the comment sign
    commands: list[str]
    tree: dict[str, Any]
    base: str | None
    comments: dict[tuple[str, ...], str] = field(default_factory=dict)


def resolved_preset(size: str, objective: str) -> str:
    """The settings of a preset as one YAML text without a base. UserError: there is no such preset."""
    chain = list(_chain(preset_file(size, objective)))
    tree: dict[str, Any] = {}
    comments: dict[tuple[str, ...], str] = {}
    for file in reversed(chain):
        tree = merged_trees(tree, file.tree)
        comments |= file.comments
    lines = [*_header(chain)]
    for key, value in tree.items():
        lines += ["", *_lines((key,), value, comments)]
    return "\n".join(lines) + "\n"


def _chain(path: Path) -> Iterator[PresetFile]:
    """The file, its base, the base's base, and so on."""
    while True:
        file = _read(path)
        yield file
        if file.base is None:
            return
        path = path.parent / file.base


def _read(path: Path) -> PresetFile:
    text = path.read_text(encoding="utf-8")
    tree = YAML(typ="rt", pure=True).load(text)  # keeps how numbers are written
    base = tree.pop("base", None)
    lines = text.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    head = lines[:end]
    about = head[: head.index("#")] if "#" in head else head
    prose = " ".join(line.removeprefix("# ") for line in about if not COMMAND.match(line))
    commands = [line for line in head if COMMAND.match(line)]
    return PresetFile(
        header=prose.replace(ABOUT_THE_BASE, ""),
        commands=commands,
        tree=tree,
        base=base,
        comments=_comments(lines[end:]),
    )


def _comments(lines: list[str]) -> dict[tuple[str, ...], str]:
    """The comment of each setting, by its path. A line that is only a comment continues the comment above it."""
    found: dict[tuple[str, ...], str] = {}
    path: tuple[str, ...] = ()
    for line in lines:
        before, sign, comment = line.partition("#")
        if match := LINE.fullmatch(before.rstrip()):
            path = (*path[: len(match["indent"]) // 2], match["key"])
            where = (*path, *_only_key(match["rest"]))
        if sign:
            found[where] = f"{found[where]} {comment.strip()}" if not before.strip() else comment.strip()
    return found


def _only_key(text: str) -> tuple[str, ...]:
    """The path to the only value of a mapping that is written in one line: ("loss", "clip") of {loss: {clip: 1}}."""
    value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    path: tuple[str, ...] = ()
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        path = (*path, key)
    return path


def _header(chain: list[PresetFile]) -> Iterator[str]:
    """The paragraphs of all files, with the commands of the first one below its own."""
    for file in chain:
        if file is not chain[0]:
            yield "#"
        yield from (f"# {line}" for line in textwrap.wrap(file.header, WIDTH, break_on_hyphens=False))
        if file is chain[0]:
            yield from (PRESET.sub("SETTINGS.yaml", line) for line in file.commands)


def _lines(path: tuple[str, ...], value: Any, comments: Mapping[tuple[str, ...], str]) -> Iterator[str]:
    """The lines of one setting or section, with its comment behind it, or above it where the line would be too long."""
    indent, comment = "  " * (len(path) - 1), comments.get(path)
    opens = isinstance(value, Mapping) and (len(path) == 1 or not _fits_one_line(path, value, comments))
    line = f"{indent}{path[-1]}:" if opens else f"{indent}{path[-1]}: {_yaml(value)}"
    if comment and len(line) + len(comment) + 3 > WIDTH + 2:
        yield from (f"{indent}# {part}" for part in textwrap.wrap(comment, WIDTH - len(indent)))
        comment = None
    yield f"{line} # {comment}" if comment else line
    if opens:
        for key, inner in value.items():
            yield from _lines((*path, key), inner, comments)


def _fits_one_line(path: tuple[str, ...], value: Mapping[str, Any], comments: Mapping[tuple[str, ...], str]) -> bool:
    """Whether a mapping has few plain values and no comment on any of them."""
    plain = not any(isinstance(inner, Mapping) for inner in value.values())
    return plain and len(value) < 4 and not any(known[: len(path)] == path and known != path for known in comments)


def _yaml(value: Any) -> str:
    """A value in YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value is None:
        return "null"
    yaml, stream = YAML(typ="rt", pure=True), io.StringIO()
    yaml.width = 10_000
    yaml.dump([value], stream)
    return stream.getvalue().removeprefix("- ").strip()
