"""What a run reads: tokenizer, prompts, training problems, held-out problems; checked, and the same on every rank."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_paint.base.counts import count_text
from megatron_paint.base.errors import UserError, about
from megatron_paint.checkpoints.adapter_reader import checked_adapter
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.checkpoints.megatron_source import MegatronSource
from megatron_paint.config.settings import LONGEST_ANSWER, EvaluateSettings, EvaluationSettings, ModelSettings, Settings
from megatron_paint.data.order import problem_order
from megatron_paint.data.problems import ProblemSet, load_problems
from megatron_paint.data.prompt_limit import PromptLimit
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.repeats import leaks
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.evaluation.benchmarks import load_benchmark
from megatron_paint.grading.grade import Grade, GradingPool, Rules
from megatron_paint.grading.graders import Graders
from megatron_paint.launch.failure_notes import NOTES_FOLDER
from megatron_paint.masker.reveal import check_extractors
from megatron_paint.models.shape import ModelShape
from megatron_paint.objectives import OBJECTIVES
from megatron_paint.records import Problem
from megatron_paint.rollouts.engine import Sampler
from megatron_paint.rollouts.replay import ReplaySampler
from megatron_paint.rollouts.source import RolloutSource
from megatron_paint.run.folder import RunFolder
from megatron_paint.run.lock_watch import refuse_if_in_use
from megatron_paint.runtime.rank_zero import OnRankZero, directly
from megatron_paint.runtime.work import Work, work
from megatron_paint.training.partners import check_partners
from megatron_paint.training.turn_notes import sft_warnings, thinking_without_effect, turn_notes, used_thinking_settings

CHECKED = "checked_problems"  # file of the launcher's folder


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run reads, except the weights."""

    prompts: Prompts
    problems: ProblemSet
    held_out: tuple[Problem, ...]  # empty: no evaluation
    evaluation: EvaluationSettings  # with the number of tokens that an answer may have
    notes: tuple[str, ...]  # what the user should know about the problems and the prompts
    warnings: tuple[str, ...]  # what may spoil the run: repeated or leaked problems, odd columns, thoughts in SFT

    def summary(self) -> tuple[str, ...]:
        """Lines for the console."""
        held_out = f", {count_text(len(self.held_out), 'held-out problem')}" if self.held_out else ""
        return (f"data       {count_text(len(self.problems), 'training problem')}{held_out}", *self.notes)


def check_inputs(settings: Settings, shape: ModelShape, *, run_folder: bool = True) -> Inputs:
    """Reads and checks everything that a run reads and, with `run_folder`, the folder that it writes to.

    Needs no model, so one process can report a mistake before any rank starts. Raises UserError.
    """
    folder = RunFolder(settings.run.dir)
    if run_folder:
        refuse_if_in_use(folder.path, on_wait=partial(print, file=sys.stderr, flush=True))
    with about("model.hf_path"):
        HuggingFaceReader(settings.model.hf_path, shape).check_tied(shape)
    check_start(settings.model, shape)
    inputs = load_inputs(settings, shape)
    if run_folder:
        folder.check(settings)
    return inputs


def check_start(model: ModelSettings, shape: ModelShape) -> None:
    """UserError unless the Megatron checkpoint or the adapter that the run starts from fits the model."""
    checked_adapter(model, shape)
    if model.megatron_path is not None:
        with about("model.megatron_path"):
            MegatronSource(model.megatron_path, shape)


def load_inputs(settings: Settings, shape: ModelShape, *, on_rank_zero: OnRankZero = directly) -> Inputs:
    """Reads and checks.

    Rank 0 reads and grades the problems for all ranks: it is done once, and ranks cannot differ in a verdict that a
    time limit decides. If the launcher has checked them already, rank 0 takes what the launcher saved.
    """
    prompts = load_prompts(settings, shape)
    problems, held_out = on_rank_zero(lambda: _saved_problems() or _read_problems(settings, shape, prompts))
    evaluation = fit_answers(settings.evaluation, shape, prompts, held_out)
    return Inputs(
        prompts=prompts,
        problems=problems,
        held_out=held_out,
        evaluation=evaluation,
        notes=(
            *on_rank_zero(lambda: HuggingFaceReader(settings.model.hf_path, shape).notes),
            *problems.notes,
            *turn_notes(prompts),
            *thinking_without_effect(prompts, used_thinking_settings(settings)),
            *shorter_answers(settings.evaluation, evaluation, shape),
        ),
        warnings=(
            *problems.warnings,
            *(() if settings.needs.samples_per_problem else sft_warnings(settings, prompts, problems.problems)),
        ),
    )


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
    samples = settings.needs.samples_per_problem
    return RolloutSource(sampler, prompts, settings.rollout, samples=samples, seed=settings.run.seed)


def replay_sampler(settings: Settings, prompts: Prompts) -> ReplaySampler:
    """The sampler of `rollout.engine: replay`."""
    return ReplaySampler(settings.rollout.path, stop_ids=prompts.tokenizer.stop_ids)


def fit_answers(
    settings: EvaluationSettings, shape: ModelShape, prompts: Prompts, problems: Sequence[Problem]
) -> EvaluationSettings:
    """The settings with the `max_new_tokens` that an evaluation on these problems uses.

    A value of the user is kept. UserError: it does not fit after the longest prompt, or a prompt alone does not fit.
    """
    limit = PromptLimit(
        length=lambda problem: len(prompts.evaluation_prompt(problem, settings.thinking)),
        positions=shape.max_positions,
        response=settings.longest_answer,
        setting="evaluation.max_new_tokens",
    )
    if not problems:
        return dataclasses.replace(settings, max_new_tokens=settings.longest_answer)
    lengths = [limit.length(problem) for problem in problems]
    longest = max(lengths)
    where = problems[lengths.index(longest)].source
    if longest >= shape.max_positions:
        raise UserError(
            f"{where}: its prompt has {longest} tokens, and the model has {shape.max_positions} positions; leave this "
            "problem out"
        )
    if settings.max_new_tokens is not None and longest > limit.most:
        raise UserError(limit.message(longest, source="the evaluation", where=where))
    most = min(settings.longest_answer, shape.max_positions - longest)
    return dataclasses.replace(settings, max_new_tokens=most)


def shorter_answers(
    asked: EvaluationSettings, fitted: EvaluationSettings, shape: ModelShape, *, of: str = "an evaluation"
) -> tuple[str, ...]:
    """A note if the default length of answers had to be shortened.

    fitted: what `fit_answers` returned for `asked`. of: what is evaluated.
    """
    if asked.max_new_tokens is not None or fitted.longest_answer == LONGEST_ANSWER:
        return ()
    return (
        f"answers    at most {fitted.longest_answer:,} tokens in {of} and not {LONGEST_ANSWER:,}, because the "
        f"model's {shape.max_positions:,} positions leave no more after the longest prompt (evaluation.max_new_tokens)",
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
    values |= {name: tuple(values[name]) for name in ("bad_rows", "notes", "warnings")}
    return ProblemSet(**values), _records(saved["held_out"])


def _records(values: Sequence[dict[str, Any]]) -> tuple[Problem, ...]:
    return tuple(Problem(**{**value, "choices": tuple(value["choices"])}) for value in values)


def _read_problems(settings: Settings, shape: ModelShape, prompts: Prompts) -> tuple[ProblemSet, tuple[Problem, ...]]:
    limit = _prompt_limit(settings, shape, prompts)
    rules = Rules(box_in_thought=settings.grading.box_in_thought)
    needs = settings.needs
    mistake = None if needs.samples_per_problem else prompts.sft_mistake
    needed_by = f"objective.name: {settings.objective.name}" if needs.solutions else None
    reveal = settings.objective.reveal
    grader = _CountingGrader()
    with GradingPool(rules=rules, on_verdict=grader.count) as grader.pool:
        problems = load_problems(
            settings.data,
            solution_needed_by=needed_by,
            view=reveal.view if needs.masker else "full",
            grade=grader.grade,
            prompt_limit=limit,
            mistake=mistake,
            domains=settings.domains,
        )
    if needs.masker:
        check_extractors(problems.problems, settings.domains, default=reveal.anchors)
        check_partners(
            problems,
            reveal.solution,
            prompts=prompts,
            limit=limit,
            steps=settings.run.steps,
            order=settings.data.order,
        )
    if needs.samples_per_problem and settings.rollout.engine == "replay":
        _check_replay(settings, shape, prompts, problems)
    held_out = None
    if settings.evaluation.problems is not None:
        held_out = load_benchmark(settings.evaluation.problems, settings.evaluation, domains=settings.domains)
    with Graders(settings.domains, seconds=settings.evaluation.grading_seconds, rules=rules) as graders:
        graders.check([*(problems.problems if needs.graders else ()), *(held_out.problems if held_out else ())])
    if held_out is None:
        return problems, ()
    leaked = leaks(problems.problems, held_out.problems)
    problems = dataclasses.replace(
        problems,
        notes=(*problems.notes, *held_out.notes),
        warnings=(*problems.warnings, *held_out.warnings, *leaked),
    )
    return problems, held_out.problems


class _CountingGrader:
    """Grades, as work that displays show."""

    def __init__(self) -> None:
        self.pool: GradingPool | None = None
        self._work: Work | None = None

    def grade(self, pairs: list[tuple[str, str]]) -> list[Grade]:
        """The grades of (solution, answer) pairs. The simple ones are not counted, so the work may end early."""
        with work("checking answers", total=len(pairs), unit="answers", at_most=True) as self._work:
            return self.pool.grade(pairs)

    def count(self) -> None:
        """Counts one verdict."""
        self._work.advance()


def _prompt_limit(settings: Settings, shape: ModelShape, prompts: Prompts) -> PromptLimit:
    """Room for a response after the longest prompt that the objective can make of a problem."""
    objective = settings.objective
    needs = settings.needs
    response = settings.rollout.max_new_tokens if needs.samples_per_problem else 0
    longest_prompt = OBJECTIVES[objective.name].longest_prompt
    return PromptLimit(
        length=lambda problem: longest_prompt(problem, prompts, objective, response=response),
        positions=shape.max_positions,
        max_tokens=settings.data.max_tokens,
        response=response,
        setting="rollout.max_new_tokens" if response else "",
        shown=needs.shown_responses and needs.shown_responses * prompts.times_shown,
    )


def _check_replay(settings: Settings, shape: ModelShape, prompts: Prompts, problems: ProblemSet) -> None:
    """Raises UserError if a rollout of a coming step is missing, or cannot be this model's.

    The problems of a step may depend on the verdicts before it (data.order=adastar). Then only the problems of the
    first step are known; a rollout that is missing later ends the run.
    """
    sampler = replay_sampler(settings, prompts)
    source = rollout_source(settings, prompts, sampler)
    resumes = settings.run.resume != "never"
    done = (RunFolder(settings.run.dir).latest_checkpoint() if resumes else None) or 0
    limits = {"max_tokens": settings.rollout.max_new_tokens, "vocab_size": shape.vocab_size}
    coming = range(done + 1, settings.run.steps + 1)
    if settings.data.order == "adastar":
        sampler.check_all(**limits)
        coming = range(1, 1 if done else 2)
    order = problem_order(settings.data, problems)
    for step in coming:
        sampler.check(source.requests(order.batch(step), step=step), **limits)
