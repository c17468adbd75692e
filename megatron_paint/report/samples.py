"""The samples of a run as the report shows them: a row of the list for each, and pages with their details."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import orjson

from megatron_paint.report.curves import is_number
from megatron_paint.report.token_texts import TokenTexts, length_in_browser

PAGE_BYTES = 1_500_000  # of sample lines, or of answers, on a page; ours: a page opens in a fraction of a second
PAGE_SAMPLES = 64
Item = TypeVar("Item")
DIGITS = 4  # significant digits of a number of a sample
# Values of single tokens that a sample line may have: label and unit.
QUANTITIES = {
    "divergence": ("divergence to the target", "nats"),
    "student_entropy": ("entropy of the student", "nats"),
    "teacher_entropy": ("entropy of the teacher", "nats"),
    "outside_mass": ("mass outside the support", "share"),
    "support_size": ("size of the support", "entries"),
    "logprob_gap": ("trainer minus sampler, log-probability", "nats"),
}
SIDES = ("student", "teacher")
COLUMNS = (
    "step",
    "id",
    "sample",
    "overlap",
    "reveal",
    "reward",
    "advantage",
    "loss",
    "tokens",
    "selected",
    "gap",
    "finished",
    "correct",
    "left_out",
    "page",
    "place",
)


@dataclass(frozen=True)
class SampleFile:
    """The lines of one step that can be read, in pages."""

    step: int
    pages: tuple[tuple[dict[str, Any], ...], ...]
    bad_lines: int

    def page_key(self, part: int) -> str:
        """The name of a page within its run."""
        return f"{self.step}_{part}"


def read_sample_file(file: Path, step: int) -> SampleFile:
    """Reads a file of samples/. Lines that are damaged are counted. OSError: the file cannot be read."""
    sized, bad = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        if (sample := _sample(line)) is None:
            bad += 1
            continue
        sized.append((sample, len(line)))
    return SampleFile(step, tuple(map(tuple, in_pages(sized))), bad)


def in_pages(sized: Iterable[tuple[Item, int]]) -> list[list[Item]]:
    """The items in pages of at most PAGE_SAMPLES. sized: each with its bytes, of which a page has about PAGE_BYTES."""
    pages: list[list[Item]] = []
    total = 0
    for item, size in sized:
        total += size
        if not pages or total > PAGE_BYTES or len(pages[-1]) == PAGE_SAMPLES:
            pages.append([])
            total = size
        pages[-1].append(item)
    return pages


def _sample(line: str) -> dict[str, Any] | None:
    try:
        sample = _parsed(line)
    except (ValueError, RecursionError):
        return None
    needed = {"id": str | int, "response_text": str, "response_ids": list}
    whole = isinstance(sample, dict) and all(isinstance(sample.get(key), kind) for key, kind in needed.items())
    lists = ("response_ids", *(f"{side}_prompt_ids" for side in SIDES))
    are_ids = whole and all(isinstance(one, int) for name in lists for one in _list(sample.get(name)))
    return sample if are_ids else None


def _parsed(line: str) -> Any:
    """The value of a line of JSON; NaN and infinities become None. ValueError, RecursionError: it is no JSON."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # it refuses NaN and halves of characters, which earlier versions may have written
        return json.loads(line, parse_constant=lambda _: None)


def list_row(sample: Mapping[str, Any], *, step: int, page: str, place: int) -> list[Any]:
    """The values of COLUMNS of one sample."""
    reveal, gap = _mapping(sample.get("reveal")), _mapping(sample.get("sampler_gap"))
    return [
        step,
        str(sample["id"]),
        sample.get("sample", 0),
        _short(sample.get("overlap")),
        _short(reveal.get("share")),
        _short(sample.get("reward")),
        _short(sample.get("advantage")),
        _short(sample.get("loss")),
        len(sample["response_ids"]),
        len(_list(sample.get("selected"))),
        _short(gap.get("largest")),
        sample.get("finished"),
        sample.get("correct"),
        "no_advantage" if sample.get("advantage") == 0 else sample.get("left_out"),  # GRPO trains on no such response
        page,
        place,
    ]


def page_content(samples: Sequence[Mapping[str, Any]], texts: TokenTexts | None) -> dict[str, Any]:
    """A page: `entries` with the details of the samples, and `tokens`, the texts of the ids in their lists.

    texts: None where the tokenizer is not there. Then responses have no tokens, and there are no prompts.
    """
    entries = [_entry(sample, texts) for sample in samples]
    ids = {token for entry in entries for top in entry.get("top", {}).values() for row in top["ids"] for token in row}
    tokens = {str(token): f"token {token}" if texts is None else texts.text(token) for token in sorted(ids)}
    return {"entries": entries, "tokens": tokens}


def _entry(sample: Mapping[str, Any], texts: TokenTexts | None) -> dict[str, Any]:
    ids, text = sample["response_ids"], sample["response_text"]
    entry: dict[str, Any] = {
        "text": text,
        "ids": ids,
        "selected": _list(sample.get("selected")),
        "anchors": [
            [str(anchor.get("kind", "")), str(anchor.get("text", "")), bool(anchor.get("found"))]
            for anchor in _list(sample.get("anchors"))
            if isinstance(anchor, dict)
        ],
        "reveal": _reveal(sample) or None,
        "domain": sample.get("domain"),
        "origin": _mapping(sample.get("origin")) or None,
        "gap": _mapping(sample.get("sampler_gap")) or None,
        "values": dict(_values(sample, len(ids))),
    }
    if top := dict(_top(sample, len(ids))):
        entry["top"] = top
    if texts is not None:
        text = texts.decode(ids)  # with the special tokens, which response_text does not have
        if (pieces := texts.pieces(ids, text)) is not None:
            entry["text"] = text
            entry["lengths"] = [length_in_browser(piece) for piece, _ in pieces]
            if any(count > 1 for _, count in pieces):
                entry["counts"] = [count for _, count in pieces]
        entry["prompts"] = {
            side: texts.decode(prompt) for side in SIDES if (prompt := _list(sample.get(f"{side}_prompt_ids")))
        }
    return {key: value for key, value in entry.items() if value is not None}


def _reveal(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What the teacher was shown. The search looks into its texts, so they are texts in a damaged file too."""
    reveal = _mapping(sample.get("reveal"))
    return {name: str(value) if name in ("shown_text", "reference_text") else value for name, value in reveal.items()}


def _values(sample: Mapping[str, Any], tokens: int) -> Iterator[tuple[str, list[float | None]]]:
    for name in QUANTITIES:
        values = sample.get(name)
        if isinstance(values, list) and len(values) == tokens and tokens:
            yield name, _numbers(values)


def _top(sample: Mapping[str, Any], tokens: int) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """Of both sides, for each token the ids that the side finds most likely, and their probabilities."""
    for side in SIDES:
        top = _mapping(sample.get(f"{side}_top"))
        ids, shares = top.get("ids"), top.get("probabilities")
        if _are_rows(ids, tokens) and _are_rows(shares, tokens) and _types(chain.from_iterable(ids)) <= {int}:
            known = _types(chain.from_iterable(shares)) <= {float}
            yield side, {"ids": ids, "probabilities": shares if known else [_numbers(row) for row in shares]}


def _are_rows(value: Any, tokens: int) -> bool:
    return isinstance(value, list) and len(value) == tokens and all(isinstance(row, list) for row in value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(values: Sequence[Any]) -> Sequence[float | None]:
    """The values themselves where all are numbers, as the run has rounded them; None in place of anything else."""
    return values if _types(values) <= {float} else [_short(value) for value in values]


def _types(values: Iterable[Any]) -> set[type]:
    return set(map(type, values))


def _short(value: Any) -> float | None:
    return float(f"{value:.{DIGITS}g}") if is_number(value) else None
