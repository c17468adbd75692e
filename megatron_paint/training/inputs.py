"""What a run reads: tokenizer, prompts, training problems, held-out problems; checked, and the same on every rank."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_paint.base.errors import UserError, about
from megatron_paint.checkpoints.hf_reader import HuggingFaceReader
from megatron_paint.config.settings import EvaluateSettings, Settings
from megatron_paint.data.problems import LoadedProblems, ProblemSet, PromptLimit, load_held_out, load_problems
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from megatron_paint.grading.grade import grade
from megatron_paint.models.shape import ModelShape
from megatron_paint.records import Problem
from megatron_paint.rollouts.replay import ReplayEngine
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.rank_zero import OnRankZero, directly


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Everything that a run reads but the weights."""

    prompts: Prompts
    problems: ProblemSet
    held_out: tuple[Problem, ...]  # empty: no evaluation
    notes: tuple[str, ...]  # what the user should know


def load_sources(settings: Settings, shape: ModelShape, *, on_rank_zero: OnRankZero = directly) -> Sources:
    """Loads and checks; `share` runs a function on one rank and gives its result to all (reading and grading of many
    rows is done once, and a verdict that a time limit decides cannot differ between ranks)."""
    prompts, held_out = load_held_out_sources(settings, shape, on_rank_zero=on_rank_zero)
    limit = _limit(settings, shape, prompts)
    problems: ProblemSet = on_rank_zero(lambda: load_problems(settings.data, grade=grade, prompt_limit=limit))
    if settings.objective.distils and settings.objective.reveal.solution == "wrong":
        _check_wrong_solutions(problems.problems, prompts, limit)
    if settings.rollout.engine == "replay" and settings.objective.samples_per_problem:
        on_rank_zero(lambda: _check_replay(settings, shape, problems))
    return Sources(prompts=prompts, problems=problems, held_out=held_out, notes=problems.notes)


def load_held_out_sources(
    settings: Settings, shape: ModelShape, *, on_rank_zero: OnRankZero = directly
) -> tuple[Prompts, tuple[Problem, ...]]:
    """Prompts and held-out problems alone; no problems where `evaluation.problems` is not set."""
    prompts = load_prompts(settings, shape)
    if settings.evaluation.problems is None:
        return prompts, ()
    limit = evaluation_limit(settings, shape, prompts)
    loaded: LoadedProblems = on_rank_zero(lambda: load_held_out(settings.evaluation, prompt_limit=limit))
    return prompts, loaded.problems


def load_prompts(settings: Settings | EvaluateSettings, shape: ModelShape) -> Prompts:
    """The model's tokenizer and the templates; UserError where the tokenizer has ids that the model lacks."""
    tokenizer = load_tokenizer(settings.model.hf_path, chat_template=settings.prompts.chat_template)
    if tokenizer.size > shape.vocab_size:
        raise UserError(
            f"model.hf_path: the tokenizer of {settings.model.hf_path} has {tokenizer.size} ids, the model only "
            f"{shape.vocab_size} rows; they do not belong together"
        )
    return Prompts(settings.prompts, tokenizer)


def check_sources(settings: Settings, shape: ModelShape, *, run_folder: bool = True) -> tuple[str, ...]:
    """Everything that can be wrong with what a run reads and, with `run_folder`, where it writes; needs no model."""
    with about("model.hf_path"):
        HuggingFaceReader(settings.model.hf_path, shape).check_tied(shape)
    sources = load_sources(settings, shape)
    if run_folder:
        RunFolder(settings.run.dir).check(settings)
    held_out = f", {len(sources.held_out):,} held-out problems" if sources.held_out else ""
    return (f"data       {len(sources.problems):,} training problems{held_out}", *sources.notes)


def _check_wrong_solutions(problems: Sequence[Problem], prompts: Prompts, limit: PromptLimit) -> None:
    """UserError where the longest problem does not fit with another one's solution."""
    longest = max(problems, key=lambda problem: len(problem.problem))
    solution = max(problems, key=lambda problem: len(problem.solution)).solution
    length = limit.length(dataclasses.replace(longest, solution=solution))
    if length > limit.most:
        raise UserError(
            f"objective.reveal.solution=wrong can make a prompt of {length} tokens, above {limit.most}, {limit.reason}"
            ": leave the longest problems or solutions out"
        )


def _check_replay(settings: Settings, shape: ModelShape, problems: ProblemSet) -> None:
    """UserError where a rollout of a step that is still to be done is missing, or cannot be this model's."""
    engine, samples = ReplayEngine(settings.rollout.path), settings.objective.samples_per_problem
    resumes = settings.run.resume != "never"
    done = RunFolder(settings.run.dir).latest_checkpoint() if resumes else None
    for step in range((done or 0) + 1, settings.run.steps + 1):
        batch = problems.batch(step)
        engine.check(step, batch, samples=samples)
        engine.check_responses(
            step, batch, vocab_size=shape.vocab_size, max_tokens=settings.rollout.max_new_tokens, samples=samples
        )


def _limit(settings: Settings, shape: ModelShape, prompts: Prompts) -> PromptLimit:
    """Room for a response after the longest prompt that a problem can have: the teacher's with almost all of the
    solution, and the line that the rest is hidden."""

    def length(problem: Problem) -> int:
        if objective.distils:
            # With hidden_nats the teacher's prompt is followed by the solution as well.
            scored = len(prompts.solution_offsets(problem.solution)) if limits_hidden else 0
            return prompts.longest_prompt(problem) + max(0, scored - response)
        solution = 0 if objective.samples_per_problem else len(prompts.sft_response(problem))
        return len(prompts.student_prompt(problem)) + solution

    objective = settings.objective
    limits_hidden = objective.reveal.hidden_nats is not None
    response = settings.rollout.max_new_tokens if objective.samples_per_problem else 0
    return PromptLimit(
        length=length,
        most=shape.max_positions - response,
        reason=f"the model's {shape.max_positions} positions"
        + (f" less rollout.max_new_tokens={response}" if response else ""),
    )


def evaluation_limit(settings: Settings | EvaluateSettings, shape: ModelShape, prompts: Prompts) -> PromptLimit:
    """Room for an answer after the prompt of an evaluation."""
    longest = settings.evaluation.max_new_tokens
    return PromptLimit(
        length=lambda problem: len(prompts.evaluation_prompt(problem, settings.evaluation.thinking)),
        most=shape.max_positions - longest,
        reason=f"the model's {shape.max_positions} positions less evaluation.max_new_tokens={longest}",
    )
