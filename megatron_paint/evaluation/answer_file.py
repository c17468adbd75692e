"""Writes answers to disk as they arrive, so that an interrupted evaluation resumes.

The first line of a file has the model and the sampling settings. Each further line is one answer. An answer whose line
is incomplete or damaged is sampled again.
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
    """The answers of one model to one benchmark.

    sampled_with: everything that the answers depend on. prompts: a digest of each problem's prompt, by problem id.
    """

    def __init__(self, path: Path, sampled_with: Mapping[str, Any], prompts: Mapping[str, str]):
        self.path = path
        self.sampled_with = json.loads(to_json(dict(sampled_with)))
        self.prompts = dict(prompts)

    def begin(self) -> dict[Key, Rollout]:
        """Returns the answers in the file and prepares the file for more.

        Raises UserError if they were sampled with other settings or prompts, or if the file has another content.
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
                self.prompts.setdefault(rollout.problem_id, values.get("prompt"))  # for a problem that is not used now
                answers[rollout.problem_id, rollout.sample_index] = rollout
        intact = [to_json({"sampled_with": self.sampled_with}), *map(self._line, answers.values())]
        if lines != [*intact, ""]:
            write_atomically(self.path, "\n".join(intact) + "\n")
        return answers

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Appends answers. Raises UserError if the disk is full. Answers that were written before are kept."""
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
        stored, current = header.get("sampled_with"), self.sampled_with
        if not isinstance(stored, dict):
            raise UserError(f"{self.path} is not a file of answers; give another --out, or remove it")
        odd = [key for key in sorted(stored.keys() | current.keys()) if stored.get(key) != current.get(key)]
        if odd:
            changes = ", ".join(f"{key} was {stored.get(key)!r} and is {current.get(key)!r}" for key in odd)
            raise UserError(
                f"{self.path} has answers that were sampled with other settings ({changes}); give another --out, or "
                "remove it"
            )

    def _check_prompt(self, problem_id: str, prompt: Any) -> None:
        if problem_id in self.prompts and prompt != self.prompts[problem_id]:
            raise UserError(
                f"{self.path} has answers to another prompt of problem {problem_id!r}: the problem, the template or "
                "evaluation.thinking has changed; give another --out, or remove it"
            )


def _parsed(line: str) -> dict[str, Any]:
    """Returns the JSON object of a line; an empty one if the line has none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _rollout(line: Mapping[str, Any]) -> Rollout | None:
    """Returns the answer of a line; None if it is incomplete or damaged."""
    id, sample, ids, finished = (line.get(name) for name in ("id", "sample", "response_ids", "finished"))
    complete = isinstance(id, str) and type(sample) is int and isinstance(finished, bool) and isinstance(ids, list)
    if not complete or not ids or not all(type(token) is int and token >= 0 for token in ids):
        return None
    return Rollout(
        problem_id=id,
        sample_index=sample,
        prompt_ids=(),
        response_ids=tuple(ids),
        logprobs=None,
        finished=finished,
    )
