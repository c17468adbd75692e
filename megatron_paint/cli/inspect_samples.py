"""`megatron-paint inspect samples`: the response of the student, and the solution as the teacher saw it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.config.saved import read_config
from megatron_paint.data.decoding import Decode
from megatron_paint.run.decoder import load_run_decoder
from megatron_paint.run.folder import RunFolder

BROKEN = "\N{REPLACEMENT CHARACTER}"  # decoding returns it for an incomplete character
LONGEST_CHARACTER = 4  # tokens
MOST_OUTSIDE = 8  # tokens listed
MOST_GAPS = 3  # responses listed
LEFT_OUT = {
    "wrong": "its answer is not right",
    "not_shortest": "a shorter response is right",
    "no_peer": "no other right response can be shown",
}
NOTHING_SHOWN = {
    "none": "the teacher saw none",
    "reference_free": "the teacher saw none; its prompt was in thinking mode",
}
HIDDEN, SELECTED, FOUND, MISSING = "dim strike", "bold black on yellow", "green", "red"


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Prints one sample of a run; returns the exit status."""
    folder = RunFolder(options.run_dir)
    has_samples = folder.samples_file(options.step).exists()  # else that is the only message
    decode = _load_decoder(folder) if has_samples else None
    inspect_sample(options.run_dir, options.step, index=options.index, id=options.id, tokenizer_decode=decode)
    return 0


def _load_decoder(folder: RunFolder) -> Decode | None:
    """Only the marks need it, so a run without its model or settings gets a line instead."""
    try:
        decode, reason = load_run_decoder(folder, read_config(folder.config_file))
    except UserError as error:
        decode, reason = None, " ".join(str(error).split())
    if decode is None:
        print(f"selected tokens are not marked: {reason}\n")
    return decode


def inspect_sample(
    run_dir: str | Path,
    step: int,
    *,
    index: int = 0,
    id: str | None = None,
    tokenizer_decode: Decode | None,
    console: Console | None = None,
) -> str:
    """Prints one sample of a step and returns its plain text.

    index: position among the samples of the step, or of the problem `id` if it is given. Without a decoder the selected
    tokens of the response are not marked. On a terminal colours mark hidden, selected, found and missing parts. In a
    file the marks are [hidden: ...], [[...]], + and -. Damaged lines of the step are left out, with a line that counts
    them. UserError: no such step, sample or problem, or the sample is damaged.
    """
    folder = RunFolder(run_dir)
    samples, parts = _read(folder, step)
    sample = _find(samples, run_dir, step, index=index, id=id)
    try:
        parts += [_head(sample), *_solution(sample), *_anchors(sample), *_response(sample, tokenizer_decode)]
        parts += [*_outside(sample, tokenizer_decode), *_gaps(samples)]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        where = f"{folder.samples_file(step)}: the sample of problem {sample['id']!r}"
        raise UserError(f"{where} is damaged ({error!r}); choose another with --index") from error
    plain = "\n".join(_to_plain(part) for part in parts)
    console = console or Console(highlight=False, emoji=False)
    if console.is_terminal:
        for part in parts:
            console.print(part, soft_wrap=True)
    else:
        console.print(Text(plain), soft_wrap=True)
    return plain


def _read(folder: RunFolder, step: int) -> tuple[list[dict[str, Any]], list[Text]]:
    """The samples that can be read, and a line about the others if there are any."""
    lines, file = folder.sample_lines(step), folder.samples_file(step)
    samples = []
    for line in lines:
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and "id" in sample:
            samples.append(sample)
    if not samples:
        raise UserError(
            f"{file} is damaged: none of its {count_text(len(lines), 'line')} is a sample. Give another step"
        )
    bad = len(lines) - len(samples)
    if not bad:
        return samples, []
    unread = f"{bad:,} of {count_text(len(lines), 'line')} cannot be read and {agreeing(bad, 'is', 'are')} left out"
    return samples, [Text(f"{file}: {unread}\n")]


def _find(
    samples: Sequence[dict[str, Any]], run_dir: str | Path, step: int, *, index: int, id: str | None
) -> dict[str, Any]:
    chosen = samples if id is None else [sample for sample in samples if str(sample["id"]) == id]
    if not chosen:
        there = ", ".join(dict.fromkeys(str(sample["id"]) for sample in samples[:5]))
        raise UserError(f"Step {step} of {run_dir} has no sample of problem {id!r}; its problems begin with {there}")
    if not 0 <= index < len(chosen):
        whose = f"step {step}" if id is None else f"problem {id!r} in step {step}"
        raise UserError(
            f"{whose} has {count_text(len(chosen), 'sample')}, 0 to {len(chosen) - 1}; there is no index {index}"
        )
    return chosen[index]


def _title(text: str) -> Text:
    return Text(f"\n== {text}", style="bold")


def _head(sample: dict[str, Any]) -> Text:
    overlap = "none" if sample["overlap"] is None else f"{sample['overlap']:.2f}"
    share = "none" if sample["reveal"] is None else f"{sample['reveal']['share']:.2f}"
    loss = "none" if sample["loss"] is None else f"{sample['loss']:.4f} nats a token"  # it was not finite
    return Text(
        f"problem {sample['id']}, step {sample['step']}: overlap {overlap}, reveal {share}, loss {loss}, "
        f"{count_text(len(sample['response_ids']), 'response token')}, {len(sample['selected'])} "
        f"selected{_verdict(sample)}",
        style="bold",
    )


def _verdict(sample: dict[str, Any]) -> str:
    """The grade of the response, and why it is not trained on."""
    text = "" if sample.get("correct") is None else f", {'right' if sample['correct'] else 'wrong'}"
    reason = sample.get("left_out")
    return text if reason is None else f"{text}, left out: {LEFT_OUT[reason]}"


def _solution(sample: dict[str, Any]) -> list[Text]:
    """The reference. A mark shows the part that the teacher did not see."""
    reveal = sample["reveal"]
    if reveal is None:
        return [_title("Solution"), Text("the teacher saw none")]
    shown, reference = reveal["shown_text"], reveal["reference_text"]
    if reveal.get("solution") in NOTHING_SHOWN:
        return [_title("Solution"), Text(NOTHING_SHOWN[reveal["solution"]])]
    title = _title(
        f"{_whose(reveal)}: {reveal['shown_tokens']:,} of {count_text(reveal['total_tokens'], 'token')} shown"
    )
    if "example" in reveal:
        return [title, Text(reveal["example"]), Text(shown)]
    if not reference.startswith(shown):
        return [title, Text(shown), _title("Complete reference, which does not begin with that text"), Text(reference)]
    return [title, Text.assemble(shown, (reference[len(shown) :], HIDDEN))]


def _whose(reveal: dict[str, Any]) -> str:
    """What the reference is."""
    view = f" (view {reveal['view']})" if "view" in reveal else ""
    match reveal.get("solution", "own"):
        case "wrong":
            return f"Solution of problem {reveal['of']}{view}" if "of" in reveal else f"Solution{view}"
        case "other_example":
            return f"Worked example, problem {reveal['of']}{view}"
        case "peer_rollout":
            return f"Response {reveal['peer']} to this problem, in place of the solution"
    return f"Solution{view}"


def _anchors(sample: dict[str, Any]) -> list[Text]:
    anchors = sample["anchors"]
    found = sum(anchor["found"] for anchor in anchors)
    lines = [_title(f"Anchors: {found} of {len(anchors)} found in the response")]
    for anchor in sorted(anchors, key=lambda anchor: not anchor["found"]):
        mark, style = ("+", FOUND) if anchor["found"] else ("-", MISSING)
        lines.append(Text(f"  {mark} {anchor['kind']:8} {anchor['text']}", style=style))
    return lines


def _response(sample: dict[str, Any], decode: Decode | None) -> list[Text]:
    """The response. Marks show its selected tokens."""
    title = _title("Response, selected positions marked")
    if decode is None:
        return [title, Text(sample["response_text"])]
    text = Text()
    for piece, selected in pieces(sample["response_ids"], set(sample["selected"]), decode):
        text.append(piece, style=SELECTED if selected else None)
    return [title, text]


def _outside(sample: dict[str, Any], decode: Decode | None) -> list[Text]:
    """The tokens where the target had the most mass outside the support; nothing without a support."""
    masses, sizes = sample.get("outside_mass"), sample.get("support_size")
    if masses is None or sizes is None:
        return []
    order = sorted(range(len(masses)), key=lambda position: -masses[position])[:MOST_OUTSIDE]
    lines = [_title(f"Target's mass outside the support: mean {sum(masses) / max(len(masses), 1):.3f}")]
    for position in order:
        token = sample["response_ids"][position]
        text = f"token {token}" if decode is None else repr(decode([token]))
        lines.append(
            Text(f"  {masses[position]:.3f} at position {position}, {sizes[position]:.0f} plausible; sampled: {text}")
        )
    return lines


def _gaps(samples: Sequence[dict[str, Any]]) -> list[Text]:
    """The responses of the step whose log-probabilities differ most; nothing if the sampler has none."""
    known = [sample for sample in samples if _has_gap(sample)]
    worst = sorted(known, key=lambda sample: -sample["sampler_gap"]["largest"])[:MOST_GAPS]
    lines = [_title("Largest differences of this step between sampler and trainer")] if worst else []
    for sample in worst:
        gap, where = sample["sampler_gap"], sample.get("origin", {}).get("server", "this run")
        lines.append(
            Text(
                f"  {gap['largest']:.2e} nats at position {gap['position']} of problem {sample['id']}, sample "
                f"{sample['sample']}, from {where}; {gap['above']} of "
                f"{count_text(len(sample['response_ids']), 'token')} above 0.1"
            )
        )
    return lines


def _has_gap(sample: dict[str, Any]) -> bool:
    """Whether its difference is complete; it is null if it was not finite."""
    gap = sample.get("sampler_gap")
    if not isinstance(gap, dict) or not {"sample", "response_ids"} <= sample.keys():
        return False
    return {"position", "above"} <= gap.keys() and isinstance(gap.get("largest"), int | float)


def pieces(ids: Sequence[int], selected: set[int], decode: Decode) -> list[tuple[str, bool]]:
    """The text in pieces of one token each, and whether each is selected.

    A character that consists of several tokens is one piece, which is selected if one of the tokens is. Tokens that
    never form a character end a piece after four tokens.
    """
    found: list[tuple[str, bool]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[start:end]))
        if text.endswith(BROKEN) and end - start < LONGEST_CHARACTER and end < len(ids):
            continue
        found.append((text, any(position in selected for position in range(start, end))))
        start = end
    return found


def _to_plain(text: Text) -> str:
    """The text with marks instead of colours."""
    plain, at = "", 0
    for span in text.spans:
        plain += text.plain[at : span.start]
        marked = text.plain[span.start : span.end]
        if span.style == HIDDEN:
            plain += f"\n[hidden: {marked}]"
        elif span.style == SELECTED:
            plain += f"[[{marked}]]"
        else:
            plain += marked
        at = span.end
    return plain + text.plain[at:]
