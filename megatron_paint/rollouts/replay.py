"""The same rollouts again, read from a file: for debugging, tests and offline data.

One JSON object a line: {"id", "step", "sample", "response_ids"}, with "finished" where it is known; a line without
"sample" is sample 0. The sample files of a run folder are such files.
"""

import json
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters

MISSING_SHOWN = 3


class _Place(NamedTuple):
    step: int
    problem_id: str
    sample_index: int


class _Response(NamedTuple):
    ids: array
    finished: bool | None
    where: str


class ReplaySampler:
    """Implements `Sampler` with the rollouts of a JSONL file, or of all *.jsonl files of a folder.

    stop_ids: ids that end a response; a response without "finished" counts as finished if one of them is its last id.
    Raises UserError that names file and line of a bad or repeated record.
    """

    def __init__(self, path: str | Path | None, *, stop_ids: Collection[int] = ()):
        if path is None:
            raise UserError("rollout.path is null; engine: replay needs a file of rollouts")
        self._path = Path(path)
        self._stop_ids = frozenset(stop_ids)
        self._responses: dict[_Place, _Response] = {}
        for file in _files(self._path):
            self._read(file)
        if not self._responses:
            raise UserError(f"rollout.path: {path} holds no rollouts")

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """The recorded response of each request's step, problem and sample; `sampling` only bounds its length.

        Raises UserError that names what the file does not have, or a response that is too long.
        """
        self.check(requests, max_tokens=sampling.max_new_tokens)
        return [self._rollout(request) for request in requests]

    def sync_weights(self, step: int) -> None:
        """Does nothing: recorded rollouts are of no weights."""

    def release_memory(self) -> None:
        """Does nothing: there is no memory between calls."""

    def metrics(self) -> dict[str, float]:
        """Empty."""
        return {}

    def check(self, requests: Sequence[GenerationRequest], *, max_tokens: int, vocab_size: int | None = None) -> None:
        """Raises UserError that names what the file does not have, or a response that cannot be this model's.

        vocab_size: ids of the model; None: ids are not checked.
        """
        missing = [place for request in requests if (place := _place(request)) not in self._responses]
        if missing:
            raise UserError(self._missing_message(missing))
        for request in requests:
            _check_response(self._responses[_place(request)], max_tokens=max_tokens, vocab_size=vocab_size)

    def check_all(self, *, max_tokens: int, vocab_size: int) -> None:
        """Raises UserError that names a response, of any step, that cannot be this model's."""
        for response in self._responses.values():
            _check_response(response, max_tokens=max_tokens, vocab_size=vocab_size)

    def _rollout(self, request: GenerationRequest) -> Rollout:
        response = self._responses[_place(request)]
        finished = response.ids[-1] in self._stop_ids if response.finished is None else response.finished
        return Rollout(
            problem_id=request.problem_id,
            sample_index=request.sample_index,
            prompt_ids=request.prompt_ids,
            response_ids=tuple(response.ids),
            logprobs=None,
            finished=finished,
        )

    def _read(self, file: Path) -> None:
        try:
            lines = file.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"rollout.path: {file} cannot be read ({error})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            place, response = _record(line, where)
            if place in self._responses:
                first = self._responses[place].where
                raise UserError(f"{where}: {_named(place)} is already at {first}; leave one of them out")
            self._responses[place] = response

    def _missing_message(self, missing: Sequence[_Place]) -> str:
        shown = "; ".join(_named(place) for place in missing[:MISSING_SHOWN])
        more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        steps = sorted({place.step for place in self._responses})
        return (
            f"rollout.path: {self._path} has no rollout for {shown}{more}; it holds "
            f"{count_text(len(self._responses), 'rollout')} of steps {steps[0]} to {steps[-1]}. The order of problems "
            "follows data.order, data.seed and data.problems_per_step: replay with those of the run that wrote the "
            "file, or add the missing rollouts"
        )


def _check_response(response: _Response, *, max_tokens: int, vocab_size: int | None) -> None:
    if vocab_size is not None and (largest := max(response.ids)) >= vocab_size:
        raise UserError(
            f"{response.where}: response_ids holds {largest}, but the model has ids 0 to {vocab_size - 1}: "
            "these rollouts are another model's"
        )
    if len(response.ids) > max_tokens:
        raise UserError(
            f"{response.where}: response_ids holds {len(response.ids)} tokens, more than "
            f"rollout.max_new_tokens={max_tokens}: raise it"
        )


def _place(request: GenerationRequest) -> _Place:
    return _Place(request.step, request.problem_id, request.sample_index)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise UserError(f"rollout.path: the folder {path} holds no *.jsonl file")
    return files


def _record(line: bytes, where: str) -> tuple[_Place, _Response]:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a line of UTF-8 JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: holds a {type(record).__name__}; a rollout is {{"id", "step", "response_ids"}}')
    problem_id = record.get("id")
    if not isinstance(problem_id, str):
        raise UserError(f"{where}: id is {problem_id!r}; it must be the problem's id, as text")
    place = _Place(_count(record.get("step"), "step", 1, where), problem_id, _sample(record, where))
    finished = record.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise UserError(f"{where}: finished is {finished!r}; it must be true or false, or be left out")
    return place, _Response(_ids(record.get("response_ids"), where), finished, where)


def _sample(record: dict[str, Any], where: str) -> int:
    return _count(record.get("sample", 0), "sample", 0, where)


def _count(value: Any, name: str, least: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{where}: {name} is {value!r}; it must be a whole number from {least}")
    return value


def _ids(value: Any, where: str) -> array:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: response_ids is {value!r}; it must be a list of at least one token id")
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise UserError(f"{where}: response_ids[{index}] is {token!r}; token ids are whole numbers from 0")
    return array("i", value)


def _named(place: _Place) -> str:
    return f"step {place.step}, problem {place.problem_id!r}, sample {place.sample_index}"
