"""What a run reads: tokenizer, prompts, training problems, held-out problems; checked, and the same on every rank."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_paint.base.errors import UserError, about
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.config.settings import EvaluateSettings, Settings
from megatron_paint.data.problems import LoadedProblems, ProblemSet, PromptLimit, load_held_out, load_problems
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.grading.grade import grade
from megatron_paint.launch.failure_notes import NOTES_FOLDER
from megatron_paint.models.shape import ModelShape
from megatron_paint.objectives import OBJECTIVES
from megatron_paint.records import Problem
from megatron_paint.rollouts.engine import Sampler
from megatron_paint.rollouts.replay import ReplaySampler
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.lock_watch import refuse_if_in_use
from megatron_paint.runtime.rank_zero import OnRankZero, directly

CHECKED = "checked_problems"  # file of the launcher's folder


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run reads, except the weights."""

    prompts: Prompts
    problems: ProblemSet
    held_out: tuple[Problem, ...]  # empty: no evaluation

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the problems."""
        return self.problems.notes

    def summary(self) -> tuple[str, ...]:
        """Lines for the console."""
        held_out = f", {len(self.held_out):,} held-out problems" if self.held_out else ""
        return (f"data       {len(self.problems):,} training problems{held_out}", *self.notes)


def check_inputs(settings: Settings, shape: ModelShape, *, run_folder: bool = True) -> Inputs:
    """Reads and checks everything that a run reads and, with `run_folder`, the folder that it writes to.

    Needs no model, so one process can report a mistake before any rank starts. Raises UserError.
    """
    folder = RunFolder(settings.run.dir)
    if run_folder:
        refuse_if_in_use(folder.path)
    with about("model.hf_path"):
        HuggingFaceReader(settings.model.hf_path, shape).check_tied(shape)
    inputs = load_inputs(settings, shape)
    if run_folder:
        folder.check(settings)
    return inputs


def load_inputs(settings: Settings, shape: ModelShape, *, on_rank_zero: OnRankZero = directly) -> Inputs:
    """Reads and checks.

    Rank 0 reads and grades the problems for all ranks: it is done once, and ranks cannot differ in a verdict that a
    time limit decides. If the launcher has checked them already, rank 0 takes what the launcher saved.
    """
    prompts = load_prompts(settings, shape)
    problems, held_out = on_rank_zero(lambda: _saved_problems() or _read_problems(settings, shape, prompts))
    return Inputs(prompts=prompts, problems=problems, held_out=held_out)


def load_prompts(settings: Settings | EvaluateSettings, shape: ModelShape) -> Prompts:
    """The model's tokenizer and the templates.

    Raises UserError if the tokenizer has ids that the model does not have.
    """
    tokenizer = load_tokenizer(settings.model.hf_path, chat_template=settings.prompts.chat_template)
    if tokenizer.size > shape.vocab_size:
        raise UserError(
            f"model.hf_path: the tokenizer of {settings.model.hf_path} has {tokenizer.size} ids, the model only "
            f"{shape.vocab_size} rows; they do not belong together"
        )
    return Prompts(settings.prompts, tokenizer)


def rollout_source(settings: Settings, prompts: Prompts, sampler: Sampler) -> RolloutSource:
    """The rollouts of the run's objective."""
    samples = settings.objective.needs.samples_per_problem
    return RolloutSource(sampler, prompts, settings.rollout, samples=samples, seed=settings.run.seed)


def replay_sampler(settings: Settings, prompts: Prompts) -> ReplaySampler:
    """The sampler of `rollout.engine: replay`."""
    return ReplaySampler(settings.rollout.path, stop_ids=prompts.tokenizer.stop_ids)


def evaluation_limit(settings: Settings | EvaluateSettings, shape: ModelShape, prompts: Prompts) -> PromptLimit:
    """Room for an answer after the prompt of an evaluation."""
    longest = settings.evaluation.max_new_tokens
    return PromptLimit(
        length=lambda problem: len(prompts.evaluation_prompt(problem, settings.evaluation.thinking)),
        most=shape.max_positions - longest,
        reason=f"the model's {shape.max_positions} positions less evaluation.max_new_tokens={longest}",
    )


def save_checked_problems(inputs: Inputs, folder: str | Path) -> None:
    """Saves the problems that the launcher has checked in its folder, for rank 0 of the ranks that it starts."""
    problems = dataclasses.asdict(inputs.problems)
    del problems["steps_per_epoch"]
    saved = {"problems": problems, "held_out": [dataclasses.asdict(problem) for problem in inputs.held_out]}
    (Path(folder) / CHECKED).write_text(json.dumps(saved), encoding="ascii")


def _saved_problems() -> tuple[ProblemSet, tuple[Problem, ...]] | None:
    """What `save_checked_problems` saved for this process; None if no launcher did."""
    file = Path(os.environ.get(NOTES_FOLDER, "")) / CHECKED
    if NOTES_FOLDER not in os.environ or not file.is_file():
        return None
    saved = json.loads(file.read_text(encoding="ascii"))
    values = saved["problems"]
    values |= {"problems": _records(values["problems"])}
    values |= {name: tuple(values[name]) for name in ("bad_rows", "notes")}
    return ProblemSet(**values), _records(saved["held_out"])


def _records(values: Sequence[dict[str, str]]) -> tuple[Problem, ...]:
    return tuple(Problem(**value) for value in values)


def _read_problems(settings: Settings, shape: ModelShape, prompts: Prompts) -> tuple[ProblemSet, tuple[Problem, ...]]:
    limit = _prompt_limit(settings, shape, prompts)
    problems = load_problems(settings.data, grade=grade, prompt_limit=limit)
    needs = settings.objective.needs
    if needs.masker and settings.objective.reveal.solution == "wrong":
        _check_wrong_solutions(problems.problems, limit)
    if needs.samples_per_problem and settings.rollout.engine == "replay":
        _check_replay(settings, shape, prompts, problems)
    if settings.evaluation.problems is None:
        return problems, ()
    held_out: LoadedProblems = load_held_out(
        settings.evaluation, prompt_limit=evaluation_limit(settings, shape, prompts)
    )
    return problems, held_out.problems


def _prompt_limit(settings: Settings, shape: ModelShape, prompts: Prompts) -> PromptLimit:
    """Room for a response after the longest prompt that the objective can make of a problem."""
    objective = settings.objective
    response = settings.rollout.max_new_tokens if objective.needs.samples_per_problem else 0
    longest_prompt = OBJECTIVES[objective.name].longest_prompt
    return PromptLimit(
        length=lambda problem: longest_prompt(problem, prompts, objective, response=response),
        most=shape.max_positions - response,
        reason=f"the model's {shape.max_positions} positions"
        + (f" less rollout.max_new_tokens={response}" if response else ""),
    )


def _check_wrong_solutions(problems: Sequence[Problem], limit: PromptLimit) -> None:
    """Raises UserError if the longest problem does not fit with another one's solution."""
    longest = max(problems, key=lambda problem: len(problem.problem))
    solution = max(problems, key=lambda problem: len(problem.solution)).solution
    length = limit.length(dataclasses.replace(longest, solution=solution))
    if length > limit.most:
        raise UserError(
            f"objective.reveal.solution=wrong can make a prompt of {length} tokens, above {limit.most}, {limit.reason}"
            ": leave the longest problems or solutions out"
        )


def _check_replay(settings: Settings, shape: ModelShape, prompts: Prompts, problems: ProblemSet) -> None:
    """Raises UserError if a rollout of a coming step is missing, or cannot be this model's."""
    sampler = replay_sampler(settings, prompts)
    source = rollout_source(settings, prompts, sampler)
    resumes = settings.run.resume != "never"
    done = RunFolder(settings.run.dir).latest_checkpoint() if resumes else None
    for step in range((done or 0) + 1, settings.run.steps + 1):
        requests = source.requests(problems.batch(step), step=step)
        sampler.check(requests, max_tokens=settings.rollout.max_new_tokens, vocab_size=shape.vocab_size)
