"""Answers on disk as they arrive, so that an evaluation that was ended goes on where it was.

The first line of a file says what the answers were sampled with; each further line is one answer. A line that a crash
cut short is sampled again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_paint.disk import append_line, disk_errors, write_atomically
from megatron_paint.errors import UserError
from megatron_paint.records import Rollout
from megatron_paint.strict_json import to_json

Key = tuple[str, int]  # problem id, sample index


class AnswerFile:
    """The answers of one model to one benchmark."""

    def __init__(self, path: Path, sampled_with: Mapping[str, Any]):
        self.path = path
        self.sampled_with = json.loads(to_json(dict(sampled_with)))

    def begin(self) -> dict[Key, Rollout]:
        """The answers that are there, in a file made ready for more.

        Errors: UserError where they were sampled with something else, which is named.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        kept = [line for line in map(_parsed, lines) if line is not None]
        if kept:
            self._check(kept[0])
        answers = {(line["id"], line["sample"]): line for line in kept[1:] if "response_ids" in line}
        header = to_json({"sampled_with": self.sampled_with})
        whole = [header, *map(to_json, answers.values())]
        if lines != [*whole, ""]:
            write_atomically(self.path, "\n".join(whole) + "\n")
        return {key: _rollout(line) for key, line in answers.items()}

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Write answers; a full disk ends in a UserError, and what was written stays."""
        for rollout in rollouts:
            line = {
                "id": rollout.problem_id,
                "sample": rollout.sample_index,
                "response_ids": list(rollout.response_ids),
                "finished": rollout.finished,
            }
            append_line(self.path, to_json(line))

    def _check(self, header: Mapping[str, Any]) -> None:
        there, here = header.get("sampled_with"), self.sampled_with
        if not isinstance(there, dict):
            raise UserError(f"{self.path} is no file of answers; give another --out, or remove it")
        odd = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
        if odd:
            changes = ", ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in odd)
            raise UserError(
                f"{self.path} holds answers that were sampled otherwise ({changes}); give another --out, or remove it"
            )


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _rollout(line: Mapping[str, Any]) -> Rollout:
    return Rollout(
        problem_id=line["id"],
        sample_index=line["sample"],
        prompt_ids=(),
        response_ids=tuple(line["response_ids"]),
        logprobs=None,
        finished=line["finished"],
    )
