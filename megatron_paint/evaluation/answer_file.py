"""Answers on disk as they arrive, so that an evaluation that was ended goes on where it was.

The first line of a file says what the answers were sampled with; each further line is one answer. A line that a crash
cut short, or that is damaged, is sampled again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.records import Rollout
from megatron_paint.runtime.files import append_line, disk_errors, write_atomically

Key = tuple[str, int]  # problem id, sample index


class AnswerFile:
    """The answers of one model to one benchmark; prompts: problem id -> what tells its prompt from others."""

    def __init__(self, path: Path, sampled_with: Mapping[str, Any], prompts: Mapping[str, str]):
        self.path = path
        self.sampled_with = json.loads(to_json(dict(sampled_with)))
        self.prompts = dict(prompts)

    def begin(self) -> dict[Key, Rollout]:
        """The answers that are there, in a file made ready for more.

        Errors: UserError where they were sampled with something else, which is named, or the file holds other things.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else []
        if any(lines):
            self._check_header(_parsed(lines[0]))
        answers = {}
        for line in lines[1:]:
            values = _parsed(line)
            if (rollout := _rollout(values)) is not None:
                self._check_prompt(rollout.problem_id, values.get("prompt"))
                self.prompts.setdefault(rollout.problem_id, values.get("prompt"))  # of a problem not asked for now
                answers[rollout.problem_id, rollout.sample_index] = rollout
        whole = [to_json({"sampled_with": self.sampled_with}), *map(self._line, answers.values())]
        if lines != [*whole, ""]:
            write_atomically(self.path, "\n".join(whole) + "\n")
        return answers

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Write answers; a full disk ends in a UserError, and what was written stays."""
        for rollout in rollouts:
            append_line(self.path, self._line(rollout))

    def _line(self, rollout: Rollout) -> str:
        return to_json(
            {
                "id": rollout.problem_id,
                "sample": rollout.sample_index,
                "prompt": self.prompts.get(rollout.problem_id),
                "response_ids": list(rollout.response_ids),
                "finished": rollout.finished,
            }
        )

    def _check_header(self, header: Mapping[str, Any]) -> None:
        there, here = header.get("sampled_with"), self.sampled_with
        if not isinstance(there, dict):
            raise UserError(f"{self.path} is no file of answers; give another --out, or remove it")
        odd = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
        if odd:
            changes = ", ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in odd)
            raise UserError(
                f"{self.path} holds answers that were sampled otherwise ({changes}); give another --out, or remove it"
            )

    def _check_prompt(self, problem_id: str, prompt: Any) -> None:
        if problem_id in self.prompts and prompt != self.prompts[problem_id]:
            raise UserError(
                f"{self.path} holds answers to another prompt of problem {problem_id!r}: the problem, the template or "
                "evaluation.thinking has changed; give another --out, or remove it"
            )


def _parsed(line: str) -> dict[str, Any]:
    """The line's object; an empty one where there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _rollout(line: Mapping[str, Any]) -> Rollout | None:
    """None where the line is no whole answer."""
    id, sample, ids, finished = (line.get(name) for name in ("id", "sample", "response_ids", "finished"))
    whole = isinstance(id, str) and type(sample) is int and isinstance(finished, bool) and isinstance(ids, list)
    if not whole or not ids or not all(type(token) is int and token >= 0 for token in ids):
        return None
    return Rollout(
        problem_id=id,
        sample_index=sample,
        prompt_ids=(),
        response_ids=tuple(ids),
        logprobs=None,
        finished=finished,
    )
