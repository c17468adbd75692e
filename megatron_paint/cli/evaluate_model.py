"""Evaluates a model: samples every benchmark, saves answers as they arrive, then grades and reports."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_paint.base.counts import agreeing, count_text
from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate_options import Requested
from megatron_paint.config.settings import EvaluateSettings
from megatron_paint.evaluation.answer_file import AnswerFile
from megatron_paint.evaluation.benchmarks import Benchmark, load_benchmarks
from megatron_paint.evaluation.evaluator import Answers, Evaluator
from megatron_paint.evaluation.summary import Evaluated, domain_text, error_warning, truncation_warning, write_summary
from megatron_paint.grading.grade import Rules
from megatron_paint.grading.graders import Graders
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.hardware import check_offloading_device
from megatron_paint.planning.layout import cache_bytes_per_token, check_layout
from megatron_paint.records import EvalReport, Problem, Rollout
from megatron_paint.rollouts.engine import Sampler
from megatron_paint.run.console import Mode, Progress
from megatron_paint.runtime.rank_zero import OnRankZero, directly
from megatron_paint.training.engines import evaluation_servers
from megatron_paint.training.inputs import fit_answers, load_prompts, shorter_answers
from megatron_paint.training.turn_notes import thinking_without_effect, turn_notes

if TYPE_CHECKING:
    from megatron_paint.mcore.ranks import Ranks

CONFIGS = ("config.json", "adapter_config.json")
SAVED_AFTER = 4  # full loads of all servers after which their answers are saved; ours
PROBED = 2**16  # bytes that are read at a file's beginning, middle and end


def load_evaluators(
    asked: Requested, shape: ModelShape, *, on_rank_zero: OnRankZero = directly, progress: Progress | None = None
) -> tuple[tuple[str, Evaluator], ...]:
    """(name, evaluator) of every benchmark.

    on_rank_zero: reads the problems on one rank for all. progress: prints what the user should know about the problems.
    Without evaluation.max_new_tokens, the longest prompt of a benchmark decides how long its answers may be. So they do
    not depend on the other benchmarks.
    """
    settings = asked.settings
    prompts = load_prompts(settings, shape)
    benchmarks: Sequence[Benchmark] = on_rank_zero(lambda: _checked_benchmarks(asked))
    if progress is not None:
        print_notes(benchmarks, progress)
    if settings.evaluation.max_new_tokens is not None:  # one error with a value that fits all benchmarks
        fit_answers(settings.evaluation, shape, prompts, [problem for one in benchmarks for problem in one.problems])
    return tuple(
        (
            one.name,
            Evaluator(
                fit_answers(settings.evaluation, shape, prompts, one.problems),
                one.problems,
                prompts,
                seed=settings.seed,
            ),
        )
        for one in benchmarks
    )


def _checked_benchmarks(asked: Requested) -> tuple[Benchmark, ...]:
    """The benchmarks. Raises UserError if one cannot be read, or if a user's function cannot grade it."""
    benchmarks = load_benchmarks(asked.benchmarks, asked.settings.evaluation, domains=asked.settings.domains)
    with _graders(asked.settings) as graders:
        graders.check(problem for one in benchmarks for problem in one.problems)
    return benchmarks


def _graders(settings: EvaluateSettings) -> Graders:
    rules = Rules(box_in_thought=settings.grading.box_in_thought)
    return Graders(settings.domains, seconds=settings.evaluation.grading_seconds, rules=rules)


def print_notes(benchmarks: Sequence[Benchmark], progress: Progress) -> None:
    """Prints the notes and warnings about the problems of the benchmarks."""
    for benchmark in benchmarks:
        for note in benchmark.notes:
            progress.note(note)
        for warning in benchmark.warnings:
            progress.warn(warning)


def evaluate(asked: Requested, *, mode: Mode = "normal") -> None:
    """Evaluates a model without a run folder, in the ranks that the environment describes."""
    from megatron_paint.mcore.ranks import joined_ranks

    settings = asked.settings
    with joined_ranks(settings.megatron) as ranks:
        layout = check_layout(settings.model, settings.megatron, settings.rollout, processes=ranks.size)
        check_offloading_device(settings.megatron, settings.rollout)
        _evaluate(asked, ranks, layout.shape, mode=mode)


def _evaluate(asked: Requested, ranks: "Ranks", shape: ModelShape, *, mode: Mode) -> None:
    """Rank 0 reads, writes, grades and prints."""
    from megatron_paint.mcore.collectives import rank_zero_does

    on_rank_zero = partial(rank_zero_does, ranks)
    progress = Progress(mode if ranks.rank == 0 else "silent", steps=0)
    evaluators = load_evaluators(asked, shape, on_rank_zero=on_rank_zero, progress=progress)
    files = {name: answer_file(asked, name, evaluator, shape) for name, evaluator in evaluators}
    done = {name: on_rank_zero(file.begin) for name, file in files.items()}
    settings = asked.settings
    for note in notes(asked, shape, evaluators):
        progress.note(note)
    found: dict[str, Answers] = {}
    with progress.live(), ExitStack() as stack:
        of_engine = _servers if settings.rollout.engine == "vllm" else _own_model
        sampler, at_once = of_engine(asked, ranks, shape, evaluators, progress, stack)
        for name, evaluator in evaluators:
            counted = _Counted(progress, name, total=evaluator.count, there=len(done[name]))
            found[name] = evaluator.sample(
                sampler,
                done=done[name],
                save=lambda rollouts, name=name, counted=counted: on_rank_zero(
                    lambda: (files[name].add(rollouts), counted.add(rollouts))
                ),
                at_once=at_once,
            )
    on_rank_zero(lambda: _report(asked, evaluators, found, files, progress))


def _own_model(
    asked: Requested,
    ranks: "Ranks",
    shape: ModelShape,
    evaluators: Sequence[tuple[str, Evaluator]],
    progress: Progress,
    stack: ExitStack,
) -> tuple[Sampler, int]:
    """The model in the ranks, and how many answers it samples between two saves."""
    from megatron_paint.mcore.runner import ModelRunner

    settings = asked.settings
    runner = ModelRunner(
        shape,
        ranks,
        model=settings.model,
        megatron=settings.megatron,
        rollout=settings.rollout,
        micro_batch_tokens=settings.micro_batch_tokens,
        seed=settings.seed,
    )
    for note in runner.notes:
        progress.note(note)
    rows = rows_at_once(settings, shape, evaluators)
    progress.note(
        f"a replica decodes {count_text(rows, 'answer')} at a time (rollout.batch_size, rollout.cache_bytes)", rows=rows
    )
    return runner.sampler, rows * ranks.dp_cp_size


def _servers(
    asked: Requested,
    ranks: "Ranks",
    shape: ModelShape,
    evaluators: Sequence[tuple[str, Evaluator]],
    progress: Progress,
    stack: ExitStack,
) -> tuple[Sampler, int]:
    """vLLM servers of the model, and how many answers they sample between two saves."""
    settings = asked.settings
    if ranks.size > 1:
        raise UserError(
            f"rollout.engine=vllm samples on its servers, and {ranks.size} processes were started: give --processes 1; "
            "rollout.vllm.servers and rollout.vllm.tensor_parallel say how many GPUs are used"
        )
    sampler = evaluation_servers(
        settings,
        shape,
        [evaluator for _, evaluator in evaluators],
        logs=asked.out / "logs",
        note=progress.note,
        stack=stack,
    )
    vllm = settings.rollout.vllm
    progress.note(f"{vllm.servers} vLLM servers sample the answers", servers=vllm.servers)
    return sampler, SAVED_AFTER * vllm.servers * vllm.requests


def notes(asked: Requested, shape: ModelShape, evaluators: Sequence[tuple[str, Evaluator]]) -> list[str]:
    """What the user should know about the prompts and the length of the answers."""
    asked_for, prompts = asked.settings.evaluation, evaluators[0][1].prompts
    found = [*turn_notes(prompts), *thinking_without_effect(prompts, {"evaluation.thinking": asked_for.thinking})]
    for name, evaluator in evaluators:
        found += shorter_answers(asked_for, evaluator.settings, shape, of=name)
    return found


def rows_at_once(settings: EvaluateSettings, shape: ModelShape, evaluators: Sequence[tuple[str, Evaluator]]) -> int:
    """How many answers of the greatest length a replica decodes together. They are saved when all have ended."""
    longest = max(
        len(evaluator.prompt(problem)) + evaluator.settings.longest_answer
        for _, evaluator in evaluators
        for problem in evaluator.problems
    )
    token_bytes = cache_bytes_per_token(shape, dtype=settings.model.dtype, megatron=settings.megatron)
    tokens = int(settings.rollout.cache_bytes // token_bytes)
    return max(1, min(settings.rollout.batch_size, tokens // longest))


class _Counted:
    """Prints the progress of sampling one benchmark."""

    def __init__(self, progress: Progress, name: str, *, total: int, there: int):
        self.progress, self.name, self.total, self.there = progress, name, total, there
        if there:
            progress.note(f"{name}: {count_text(there, 'answer')} {agreeing(there, 'exists', 'exist')} already")

    def add(self, rollouts: Sequence[Rollout]) -> None:
        self.there += len(rollouts)
        self.progress.note(
            f"{self.name}: {self.there:,} of {count_text(self.total, 'answer')}", benchmark=self.name, done=self.there
        )


def answer_file(asked: Requested, name: str, evaluator: Evaluator, shape: ModelShape) -> AnswerFile:
    """The file of the answers to a benchmark, with everything that the answers depend on."""
    prompts = {problem.id: digest(repr(evaluator.prompt(problem)).encode()) for problem in evaluator.problems}
    return AnswerFile(asked.out / f"{name}.answers.jsonl", sampled_with(asked, evaluator, shape), prompts)


def digest(content: bytes) -> str:
    """The beginning of a SHA-256, long enough to distinguish contents."""
    return hashlib.sha256(content).hexdigest()[:16]


def sampled_with(asked: Requested, evaluator: Evaluator, shape: ModelShape) -> dict[str, Any]:
    """Everything that an answer depends on, except its problem and number. Any change makes another evaluation.

    YaRN is in the config and not in the weights, so it is recorded beside them.
    """
    settings, evaluation = asked.settings, evaluator.settings
    by_servers = settings.rollout.engine == "vllm"
    frame = evaluator.prompt(Problem(id="", problem="", solution="", answer=""))
    weights = [fingerprint(folder) for folder in asked.folders]
    if (base := Path(settings.model.hf_path)) not in asked.folders:  # a Megatron checkpoint has its configs there
        weights.append(digest(_configs(base)))
    return {
        "model": str(asked.folders[0].resolve()),
        "weights": "+".join(weights),
        "dtype": settings.model.dtype,
        "fp8": None if by_servers else settings.megatron.fp8 and settings.megatron.fp8_recipe,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "top_k": evaluation.top_k,
        "max_new_tokens": evaluation.max_new_tokens,
        "thinking": evaluation.thinking,
        "template": digest(repr(frame).encode()),  # with the chat template around it
        "stop_ids": sorted(evaluator.prompts.tokenizer.stop_ids),
        "seed": settings.seed,
        **({"yarn": vars(shape.yarn)} if shape.yarn is not None else {}),
        # Two engines draw other tokens from the same distribution.
        **({"engine": "vllm", "vllm_args": list(settings.rollout.vllm.extra_args)} if by_servers else {}),
    }


def fingerprint(folder: Path) -> str:
    """A fingerprint of a folder's model: of its configs, and of its weights.

    Weights enter with the names and sizes of their files, and the bytes at each file's beginning, middle and end.
    """
    found = hashlib.sha256(_configs(folder))
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".distcp")):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - PROBED)):
                opened.seek(place)
                found.update(opened.read(PROBED))
    return found.hexdigest()[:16]


def _configs(folder: Path) -> bytes:
    """What a model's answers depend on beside its weights, such as rope_theta and lora_alpha."""
    files = [folder / name for name in CONFIGS]
    return b" ".join(file.name.encode() + b" " + file.read_bytes() for file in files if file.is_file())


def _report(
    asked: Requested,
    evaluators: Sequence[tuple[str, Evaluator]],
    found: dict[str, Answers],
    files: dict[str, AnswerFile],
    progress: Progress,
) -> None:
    reports: list[EvalReport] = []
    with _graders(asked.settings) as graders:
        for name, evaluator in evaluators:
            reports.append(evaluator.report(found[name], step=0, benchmark=name, graders=graders))
    finish(asked.out, asked.model, reports, sampled_with_of_all(files), progress)


def sampled_with_of_all(files: dict[str, AnswerFile]) -> dict[str, Any]:
    """What all answers depend on. Where benchmarks differ, as in max_new_tokens, a value for each benchmark."""
    each = {name: file.sampled_with for name, file in files.items()}
    first = next(iter(each.values()))
    return {
        key: value if all(one[key] == value for one in each.values()) else {name: each[name][key] for name in each}
        for key, value in first.items()
    }


def finish(
    out: Path, model: str, reports: Sequence[EvalReport], sampled_with: dict[str, Any], progress: Progress
) -> None:
    """Writes and prints the results."""
    evaluated = Evaluated(model=model, reports=tuple(reports), sampled_with=sampled_with)
    write_summary(out, evaluated)
    progress.end(after=reports, folder=str(out), model=model)
    for report in reports:
        if domains := domain_text(report):
            progress.result(f"{report.benchmark} by domain: {domains}")
        for warning in (truncation_warning(report), error_warning(report)):
            if warning is not None:
                progress.warn(warning)
    if len(reports) > 1:
        macro = evaluated.macro
        progress.result(
            f"Macro average {100 * macro.mean:.1f} % [{100 * macro.low:.1f}, {100 * macro.high:.1f}]",
            macro=[macro.mean, macro.low, macro.high],
        )
