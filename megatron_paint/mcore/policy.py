"""The policy on Megatron-Core: generation, the teacher's pass, the student's pass and the step, over all ranks.

Every rank is called with the records of the complete step. A sample belongs to one data-parallel replica. There the
last pipeline stage computes the loss from hidden states, and tensor-parallel ranks share the vocabulary.

Axes: T tokens of a micro-batch, N response tokens of it, H hidden size.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_paint.config.objective import TeacherSettings
from megatron_paint.config.settings import Settings
from megatron_paint.losses import token_logprobs
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.interface import ResponseRows, TokenLoss
from megatron_paint.mcore.async_writer import Writer
from megatron_paint.mcore.batch import Assignment, MicroBatch, assign, computed_tokens
from megatron_paint.mcore.checkpoint import copy_checkpoint, load_checkpoint
from megatron_paint.mcore.collectives import gather_entries
from megatron_paint.mcore.forward_pass import ForwardPass, LossResult
from megatron_paint.mcore.fp8_emulation import without_fp8
from megatron_paint.mcore.likely_tokens import likely_tokens
from megatron_paint.mcore.optimizer import (
    complete_weights,
    cosine,
    main_gradients,
    make_optimizer,
    take_step,
    wrap_data_parallel,
)
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.mcore.routing import RoutingCounts
from megatron_paint.mcore.runner import ModelRunner
from megatron_paint.mcore.scores import NonFinite, score_samples
from megatron_paint.mcore.teacher import Teacher, TeacherStates, Weights
from megatron_paint.mcore.vocabulary import vocab_axis
from megatron_paint.mcore.weight_source import StageWeights
from megatron_paint.models.shape import ModelShape
from megatron_paint.policy import ScoredSequence
from megatron_paint.records import Sample, SampleScore, TokenIds, UpdateReport
from megatron_paint.runtime.heartbeat import mark_progress
from megatron_paint.runtime.timer import Timer


class MegatronPolicy(ModelRunner):
    """Implements `megatron_paint.policy.Policy`; one that is not `trained` has no gradients, optimiser or teacher."""

    def __init__(self, settings: Settings, shape: ModelShape, ranks: Ranks, *, trained: bool = True):
        super().__init__(
            shape,
            ranks,
            model=settings.model,
            megatron=settings.megatron,
            rollout=settings.rollout,
            micro_batch_tokens=settings.data.micro_batch_tokens,
            seed=settings.run.seed,
            loads_adapters=not trained,
        )
        self.settings = settings
        self.before_change: Callable[[], None] = lambda: None
        megatron = settings.megatron
        self.wrapped = wrap_data_parallel(self.stage, megatron) if trained else self.stage.chunks
        if trained and megatron.overlap_param_gather:
            self.stage.complete_weights = partial(complete_weights, self.wrapped)
        self.optimizer = make_optimizer(self.wrapped, settings.optimizer, megatron) if trained else None
        taught = trained and settings.needs.teacher
        self.teacher = Teacher(
            self.stage,
            settings.objective.teacher if taught else TeacherSettings(weights="current"),
            keeps_initial=trained and settings.needs.initial,
            starts_adapted=settings.model.adapter_path is not None,
        )
        self.writer = Writer(ranks)
        self.vocab = vocab_axis(shape, ranks, self.stage.config)
        self.routing = RoutingCounts(self.stage, ranks)
        self.forward = ForwardPass(
            ranks=ranks,
            stage=self.stage,
            models=self.wrapped,
            micro_batch_tokens=settings.data.micro_batch_tokens,
            token_multiple=self.multiple,
        )

    def update(self, samples: Sequence[Sample], loss: TokenLoss, *, lr: float) -> UpdateReport:
        """One optimiser step.

        FloatingPointError: a loss or the gradient is not finite, or the gradient is larger than the settings allow;
        the optimiser has not changed any weight.
        """
        timer = Timer(_device_time)
        mark_progress("teacher")
        with timer("teacher"):
            states = self.teacher_states(samples, loss)
        mark_progress("student")
        with timer("student"), self.routing.counting():
            scores = self.backward(samples, loss, states)
        with timer("rollout"):
            self.before_change()  # the gradient rests in its buffers, which a pass without gradient leaves alone
        mark_progress("optimizer")
        with timer("optimizer"):
            settings = self.settings.optimizer
            norm = take_step(
                self.optimizer,
                lr=lr,
                weight_decay=settings.weight_decay,
                largest_norm=settings.grad_norm_skip_threshold,
            )
            self.teacher.follow()
        return UpdateReport(scores=scores, grad_norm=norm, seconds=timer.seconds, metrics=self.routing.metrics())

    def evaluate_loss(
        self, samples: Sequence[Sample], loss: TokenLoss, *, teach_itself: bool = False
    ) -> tuple[SampleScore, ...]:
        """The loss of each sample without a step. With `teach_itself` the current weights are the teacher.

        The teacher then computes each sample in a separate micro-batch, so rounding differs from the student's pass.
        FloatingPointError: a loss is not finite.
        """
        mark_progress("student")
        if teach_itself:
            itself = Teacher(self.stage, TeacherSettings(weights="current"))
            row_by_row = dataclasses.replace(self.forward, micro_batch_tokens=1)
            states = self.teacher_states(samples, loss, teacher=itself, forward=row_by_row)
        else:
            states = self.teacher_states(samples, loss)
        score = self._score_with(loss, samples, states)
        found = self.forward.run(_student_sequences(samples), self._assignment(samples), score)
        return self._gather_scores([part.result for part in found], len(samples))

    def fp8_gradient_cosine(self, samples: Sequence[Sample], loss: TokenLoss) -> float:
        """The cosine between the gradient of the loss with FP8's products and without them, over all trained weights.

        No weight changes. FloatingPointError: a loss is not finite.
        """
        found = []
        for context in (nullcontext(), without_fp8(self.stage)):
            with context:
                self.backward(samples, loss, self.teacher_states(samples, loss))
            found.append(main_gradients(self.optimizer))
        self.optimizer.zero_grad()
        return cosine(*found, self.ranks.device)

    def logprobs(
        self,
        sequences: Sequence[ScoredSequence],
        *,
        weights: Literal["teacher", "current"],
        temperature: float = 1.0,
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of each sequence's response tokens in nats.

        FloatingPointError: a log-probability is not finite.
        """
        mark_progress("scoring")
        objective = self.settings.objective

        def score(batch: MicroBatch, hidden_NH: Tensor) -> dict[int, tuple[float, ...]]:
            scored = token_logprobs(
                hidden_NH,
                self.stage.output_weight(),
                batch.token_ids_N,
                vocab=self.vocab,
                temperature=temperature,
                chunk_bytes=objective.chunk_bytes,
                kernel=loss_kernel(objective.kernel),
            )
            return {index: tuple(part.tolist()) for index, part in _by_index(batch, scored.logp_T).items()}

        assignment = self._assigned(sequences, [sequence.num_tokens for sequence in sequences])
        with self.teacher.in_place() if weights == "teacher" else nullcontext():
            found = self.forward.run(sequences, assignment, score)
        merged = gather_entries(_merged(found) if self.ranks.tp_rank == 0 else {}, self.ranks)
        for index, logprobs in merged.items():
            if not all(map(math.isfinite, logprobs)):
                raise FloatingPointError(f"a log-probability of sequence {index} is not finite ({weights} weights)")
        return [merged[i] for i in range(len(sequences))]

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        self.stage.complete_weights()
        write = copy_checkpoint(folder, self.stage, self.optimizer, self.teacher, state, self.ranks)
        self.writer.start(write)

    def finish_save(self, *, wait: bool) -> bool:
        return self.writer.finish(wait=wait)

    def load(self, folder: Path) -> dict[str, Any]:
        return load_checkpoint(folder, self.stage, self.optimizer, self.teacher)

    def export(self, folder: Path, *, card: str | None = None) -> None:
        model = self.settings.model
        weights = StageWeights(self.stage, self.shape, self.ranks, model)
        if model.lora is not None and model.lora.export == "adapter":
            weights.export_adapters(folder, card=card)
        else:
            weights.export(folder, card=card)

    def teacher_states(
        self,
        samples: Sequence[Sample],
        loss: TokenLoss,
        *,
        teacher: Teacher | None = None,
        forward: ForwardPass | None = None,
    ) -> TeacherStates:
        """What the loss needs from the teacher. Defaults: this policy's teacher and its usual micro-batches."""
        teacher, forward = teacher or self.teacher, forward or self.forward
        assignment = self._assignment(samples)

        def hidden(prompts: Iterable[TokenIds], of: Teacher, weights: Weights = "teacher") -> dict[int, Tensor]:
            sequences = [
                ScoredSequence(prompt_ids=prompt, response_ids=sample.response_ids)
                for prompt, sample in zip(prompts, samples, strict=True)
            ]
            with of.in_place(weights):
                return _merged(forward.run(sequences, assignment, _by_index))

        prompts = {"teacher": (s.teacher_prompt_ids for s in samples)}
        prompts["full"] = (s.full_teacher_prompt_ids for s in samples)
        prompts["initial"] = (s.student_prompt_ids for s in samples)
        output_weight_VH = teacher.output_weight() if loss.needs_teacher else None
        initial_output_weight_VH = None
        if loss.needs_initial:
            # A second copy of the same weights would be made of those that rest in host memory.
            is_teachers = teacher is self.teacher and self.settings.objective.teacher.weights == "initial"
            shared = output_weight_VH is not None and is_teachers
            initial_output_weight_VH = output_weight_VH if shared else self.teacher.output_weight("initial")
        return TeacherStates(
            hidden_NH=hidden(prompts["teacher"], teacher) if loss.needs_teacher else None,
            full_hidden_NH=hidden(prompts["full"], teacher) if loss.needs_full_teacher else None,
            output_weight_VH=output_weight_VH,
            initial_hidden_NH=hidden(prompts["initial"], self.teacher, "initial") if loss.needs_initial else None,
            initial_output_weight_VH=initial_output_weight_VH,
        )

    def backward(self, samples: Sequence[Sample], loss: TokenLoss, states: TeacherStates) -> tuple[SampleScore, ...]:
        """The student's pass: scores of all samples, and the loss's gradient in Megatron's gradient buffers.

        FloatingPointError: the loss of a sample is not finite.
        """
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        score = self._score_with(loss, samples, states, kept=self.settings.run.keep_token_values)
        sequences, assignment = _student_sequences(samples), self._assignment(samples)
        if self.settings.megatron.has_auxiliary_loss:
            self._scale_auxiliary_losses(sequences, assignment)
        found = self.forward.run_backward(sequences, assignment, score)
        return self._gather_scores(found, len(samples))

    def _scale_auxiliary_losses(self, sequences: Sequence[ScoredSequence], assignment: Assignment) -> None:
        """Makes the losses of a mixture's routers means over all tokens of the pass.

        Megatron multiplies such a loss by the tokens of its micro-batch, and divides the sum by the tokens that carry
        the main loss: all response tokens.
        """
        forward = self.forward
        computed = computed_tokens(
            sequences,
            assignment,
            limit=forward.micro_batch_tokens,
            multiple=forward.token_multiple,
            context=forward.context,
            in_groups_of=forward.in_groups_of,
        )
        scale = sum(len(sequence.response_ids) for sequence in sequences) / computed
        self.stage.config.moe_grad_scale_func = partial(torch.tensor, scale)

    def _score_with(
        self, loss: TokenLoss, samples: Sequence[Sample], states: TeacherStates, *, kept: int = 0
    ) -> Callable[[MicroBatch, Tensor], LossResult[dict[int, SampleScore | NonFinite]]]:
        """The loss step of one micro-batch: its result is the score of each sample, by the sample's index.

        kept: how many samples, the first ones, keep the values of their tokens.
        """
        run, chunk_bytes = self.settings.run, self.settings.objective.chunk_bytes

        def score(batch: MicroBatch, student_NH: Tensor) -> LossResult[dict[int, SampleScore | NonFinite]]:
            self.stage.complete_weights()  # the output layer's: the loss uses them, and no layer does
            rows = ResponseRows(
                samples=tuple(samples[i] for i in batch.indices),
                lengths=batch.lengths,
                token_ids_N=batch.token_ids_N,
                student_hidden_NH=student_NH,
                output_weight_VH=self.stage.output_weight(),
                vocab=self.vocab,
                teacher_hidden_NH=_rows_of(states.hidden_NH, batch, like=student_NH),
                teacher_output_weight_VH=states.output_weight_VH,
                full_teacher_hidden_NH=_rows_of(states.full_hidden_NH, batch, like=student_NH),
                initial_hidden_NH=_rows_of(states.initial_hidden_NH, batch, like=student_NH),
                initial_output_weight_VH=states.initial_output_weight_VH,
            )
            likely = likely_tokens(rows, batch.indices, kept=kept, count=run.keep_top_tokens, chunk_bytes=chunk_bytes)
            output = loss(rows)
            scores = score_samples(
                output,
                batch,
                samples,
                rank=self.ranks.rank,
                keep_logprobs=loss.keeps_logprobs,
                kept=kept,
                likely=likely,
            )
            return LossResult(output.loss_T.sum(), output.carries_loss_T.sum().to(torch.int), scores)

        return score

    def _assignment(self, samples: Sequence[Sample]) -> Assignment:
        """Who computes each sample, the same in the teacher's and the student's pass."""
        costs = [len(s.student_prompt_ids) + len(s.teacher_prompt_ids or ()) + 2 * len(s.response_ids) for s in samples]
        return self._assigned(_student_sequences(samples), costs)

    def _assigned(self, sequences: Sequence[ScoredSequence], costs: Sequence[int]) -> Assignment:
        return assign(sequences, costs, replicas=self.ranks.dp_size, contexts=self.ranks.cp_size)

    def _gather_scores(
        self, found: Sequence[dict[int, SampleScore | NonFinite]], count: int
    ) -> tuple[SampleScore, ...]:
        """The scores of all `count` samples on every rank; FloatingPointError where a loss is not finite."""
        merged = gather_entries(_merged(found) if self.ranks.tp_rank == 0 else {}, self.ranks)
        problems = [score for score in merged.values() if isinstance(score, NonFinite)]
        if problems:
            raise FloatingPointError("; ".join(str(problem) for problem in problems[:3]))
        return tuple(merged[i] for i in range(count))


def _student_sequences(samples: Sequence[Sample]) -> list[ScoredSequence]:
    return [ScoredSequence(prompt_ids=s.student_prompt_ids, response_ids=s.response_ids) for s in samples]


def _by_index(batch: MicroBatch, rows: Tensor) -> dict[int, Tensor]:
    """The rows, [N] or [N, H], of each sequence of a micro-batch, by its index."""
    return dict(zip(batch.indices, rows.split(batch.lengths), strict=True))


def _merged(parts: Iterable[dict[int, Any]]) -> dict[int, Any]:
    return {index: value for part in parts for index, value in part.items()}


def _rows_of(hidden: dict[int, Tensor] | None, batch: MicroBatch, *, like: Tensor) -> Tensor | None:
    """The teacher's rows [N, H] of a micro-batch; an empty micro-batch has none, of the student's width and type."""
    if hidden is None:
        return None
    return torch.cat([hidden[i] for i in batch.indices]) if batch.indices else like.detach()


def _device_time() -> float:
    """Seconds, after the device has done all work that was started on it."""
    torch.cuda.synchronize()
    return time.perf_counter()
