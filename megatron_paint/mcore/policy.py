"""The policy on Megatron-Core: generation, teacher pass, student pass and step over all ranks.

Every rank is called with the whole step's records. A sample belongs to one data-parallel replica; within it, the last
pipeline stage computes the loss from hidden states, and tensor-parallel ranks share the vocabulary.

Axes: T tokens of a micro-batch, N response tokens of it, H hidden size.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_paint.config.settings import Settings, TeacherSettings
from megatron_paint.losses import ShardedVocab, VocabAxis, WholeVocab
from megatron_paint.losses.elementwise.choose import loss_kernel
from megatron_paint.losses.interface import ResponseRows, TokenLoss
from megatron_paint.losses.objectives import CrossEntropyLoss
from megatron_paint.mcore.async_writer import Writer
from megatron_paint.mcore.batch import (
    MicroBatch,
    ScoredSequence,
    assign_replicas,
    cut_micro_batches,
    make_micro_batches,
)
from megatron_paint.mcore.checkpoint import copy_checkpoint, load_checkpoint
from megatron_paint.mcore.hf_checkpoint import export_adapters, export_stage
from megatron_paint.mcore.model import DTYPES
from megatron_paint.mcore.optimizer import make_optimizer, take_step, wrap_data_parallel
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.mcore.response_rows import response_rows
from megatron_paint.mcore.runner import ModelRunner
from megatron_paint.mcore.scores import NonFinite, score_samples
from megatron_paint.mcore.teacher import Teacher
from megatron_paint.models.shape import ModelShape
from megatron_paint.records import Sample, SampleScore, UpdateReport
from megatron_paint.runtime.heartbeat import beat


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
        megatron = settings.megatron
        self.wrapped = wrap_data_parallel(self.stage, megatron) if trained else self.stage
        self.optimizer = make_optimizer(self.wrapped, settings.optimizer, megatron) if trained else None
        taught = trained and settings.objective.has_teacher
        self.teacher = Teacher(self.stage, settings.objective.teacher if taught else TeacherSettings(weights="current"))
        self.writer = Writer(ranks)

    def update(self, samples: Sequence[Sample], loss: TokenLoss, *, lr: float) -> UpdateReport:
        """One optimiser step; FloatingPointError, before the optimiser, where a loss or the gradient is not finite."""
        scores, seconds = self.accumulate(samples, loss)
        with _timed(seconds, "optimizer"):
            norm = take_step(self.optimizer, lr=lr, weight_decay=self.settings.optimizer.weight_decay)
            self.teacher.follow()
        return UpdateReport(scores=scores, grad_norm=norm, seconds=seconds)

    def evaluate_loss(
        self, samples: Sequence[Sample], loss: TokenLoss, *, teach_itself: bool = False
    ) -> tuple[SampleScore, ...]:
        """The loss of each sample without a step; with `teach_itself` the current weights are the teacher, which then
        scores row by row: the same numbers by another way."""
        teacher = Teacher(self.stage, TeacherSettings(weights="current")) if teach_itself else self.teacher
        return self.accumulate(samples, loss, forward_only=True, teacher=teacher, teacher_alone=teach_itself)[0]

    def teacher_logprobs(self, samples: Sequence[Sample]) -> list[tuple[float, ...]]:
        """Log-probabilities of each sample's response tokens, in nats, under the teacher's weights and prompt."""
        objective = self.settings.objective
        loss = CrossEntropyLoss(
            chunk_bytes=objective.chunk_bytes, kernel=loss_kernel(objective.kernel), keeps_logprobs=True
        )
        shown = [dataclasses.replace(s, student_prompt_ids=s.teacher_prompt_ids, rollout=None) for s in samples]
        with self.teacher.in_place():
            scores, _ = self.accumulate(shown, loss, forward_only=True)
        return [score.token_logprobs for score in scores]

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        write = copy_checkpoint(folder, self.stage, self.optimizer, self.teacher, state, self.ranks)
        self.writer.start(write)

    def finish_save(self, *, wait: bool) -> bool:
        return self.writer.finish(wait=wait)

    def load(self, folder: Path) -> dict[str, Any]:
        return load_checkpoint(folder, self.stage, self.optimizer, self.teacher)

    def export(self, folder: Path) -> None:
        model, ranks = self.settings.model, self.ranks
        if model.lora is not None and model.lora.export == "adapter":
            export_adapters(self.stage, folder, lora=model.lora, ranks=ranks, source=model.hf_path)
            return
        dtype = DTYPES[model.dtype]
        export_stage(self.stage, folder, shape=self.shape, ranks=ranks, dtype=dtype, source=model.hf_path)

    def accumulate(
        self,
        samples: Sequence[Sample],
        loss: TokenLoss,
        *,
        forward_only: bool = False,
        teacher: Teacher | None = None,
        teacher_alone: bool = False,
    ) -> tuple[tuple[SampleScore, ...], dict[str, float]]:
        """Teacher pass and student pass of a step: scores of all samples, and, unless `forward_only`, the gradient of
        the loss divided by the global number of tokens that carry it, in Megatron's gradient buffers.

        teacher_alone: the teacher scores each sample in a micro-batch of its own.
        """
        _check_normalisation(self.stage.config)
        teacher = teacher or self.teacher
        costs = [len(s.student_prompt_ids) + len(s.teacher_prompt_ids or ()) + 2 * len(s.response_ids) for s in samples]
        replicas = assign_replicas(costs, self.ranks.dp_size)
        seconds: dict[str, float] = {}
        teachers: dict[str, dict[int, Tensor]] = {}
        with _timed(seconds, "teacher"):
            if loss.needs_teacher:
                limit = 1 if teacher_alone else None
                hidden = self._score(samples, replicas, "teacher_prompt_ids", teacher, limit=limit)
                teachers["teacher_hidden_NH"] = hidden
            if loss.needs_full_teacher:
                teachers["full_teacher_hidden_NH"] = self._score(samples, replicas, "full_teacher_prompt_ids", teacher)
        with _timed(seconds, "student"):
            found: dict[int, SampleScore | NonFinite] = {}
            evaluate = partial(
                self._loss_of, samples, loss, teachers, found, teacher.output_weight() if teachers else None
            )
            if not forward_only:
                self.wrapped.zero_grad_buffer()
                self.optimizer.zero_grad()
            with torch.set_grad_enabled(not forward_only):
                self._pass(samples, replicas, "student_prompt_ids", evaluate, forward_only=forward_only)
        merged = self._exchange(found if self.ranks.tp_rank == 0 else {})
        problems = [score for score in merged.values() if isinstance(score, NonFinite)]
        if problems:
            raise FloatingPointError("; ".join(str(problem) for problem in problems[:3]))
        return tuple(merged[i] for i in range(len(samples))), seconds

    def _score(
        self,
        samples: Sequence[Sample],
        replicas: list[list[int]],
        prompts: str,
        teacher: Teacher,
        *,
        limit: int | None = None,
    ) -> dict[int, Tensor]:
        """Final hidden states [N, H] at each sample's response rows under the teacher; empty but on the last stage."""
        hidden: dict[int, Tensor] = {}

        def keep(batch: MicroBatch, hidden_T1H: Tensor, non_loss_data: bool = True) -> None:
            rows_NH = self._response_rows(hidden_T1H, batch)
            hidden.update(zip(batch.indices, rows_NH.split(batch.lengths), strict=True))

        with torch.no_grad(), teacher.in_place():
            self._pass(samples, replicas, prompts, keep, forward_only=True, limit=limit)
        return hidden

    def _pass(
        self,
        samples: Sequence[Sample],
        replicas: list[list[int]],
        prompts: str,
        at_the_end: Callable[[MicroBatch, Tensor], Any],
        *,
        forward_only: bool,
        limit: int | None = None,
    ) -> None:
        """Runs all micro-batches of this replica through the pipeline; `at_the_end` meets the last stage's output.

        limit: tokens of a micro-batch, data.micro_batch_tokens if left out.
        """

        def sequences(indices: Sequence[int]) -> list[ScoredSequence]:
            return [
                ScoredSequence(index=i, prompt_ids=getattr(samples[i], prompts), response_ids=samples[i].response_ids)
                for i in indices
            ]

        limit = limit or self.settings.data.micro_batch_tokens
        sizes = [[s.num_tokens for s in sequences(replica)] for replica in replicas]
        count = max(len(cut_micro_batches(sizes_, limit, multiple=self.multiple)) for sizes_ in sizes)
        batches = make_micro_batches(
            sequences(replicas[self.ranks.dp_rank]),
            limit=limit,
            multiple=self.multiple,
            count=count,
            device=self.ranks.device,
        )

        def forward_step(iterator: Iterator[MicroBatch], model) -> tuple[Tensor, Callable]:
            beat("student" if prompts == "student_prompt_ids" else "teacher")
            batch = next(iterator)
            return model(batch.ids_T, batch.rows), partial(at_the_end, batch)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.wrapped],
            num_microbatches=len(batches),
            seq_length=self.multiple,  # real lengths travel with the tensors
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _response_rows(self, hidden_T1H: Tensor, batch: MicroBatch) -> Tensor:
        """Rows that predict response tokens, [N, H], whole on every tensor-parallel rank."""
        # Under sequence parallelism the loss leaves each rank's part of the gradient; the rows' backward sums them.
        group = self.ranks.tp_group if self.stage.config.sequence_parallel else None
        return response_rows(hidden_T1H, batch.predicting_N, group)

    def _vocab(self) -> VocabAxis:
        if self.ranks.tp_size == 1:
            return WholeVocab()
        reduce = not self.stage.config.sequence_parallel
        return ShardedVocab.evenly_cut(self.ranks.tp_group, self.shape.vocab_size, reduce_hidden_grad=reduce)

    def _loss_of(
        self,
        samples: Sequence[Sample],
        loss: TokenLoss,
        teachers: dict[str, dict[int, Tensor]],
        found: dict[int, SampleScore | NonFinite],
        teacher_weight_VH: Tensor | None,
        batch: MicroBatch,
        hidden_T1H: Tensor,
        non_loss_data: bool = False,
    ) -> tuple[Tensor, Tensor, dict]:
        """Sum of the loss over a micro-batch and the number of tokens that carry it, as Megatron's schedule wants."""
        student_NH = self._response_rows(hidden_T1H, batch)
        kept = {
            name: torch.cat([hidden[i] for i in batch.indices]) if batch.indices else student_NH.detach()
            for name, hidden in teachers.items()
        }
        output = loss(
            ResponseRows(
                lengths=batch.lengths,
                samples=tuple(samples[i] for i in batch.indices),
                token_ids_N=batch.token_ids_N,
                student_hidden_NH=student_NH,
                output_weight_VH=self.stage.output_weight(),
                vocab=self._vocab(),
                teacher_output_weight_VH=teacher_weight_VH,
                **kept,
            )
        )
        found |= score_samples(output, batch, samples, rank=self.ranks.rank, keep_logprobs=loss.keeps_logprobs)
        return output.loss_T.sum(), output.carries_loss_T.sum().to(torch.int), {}


def _check_normalisation(config: TransformerConfig) -> None:
    """ValueError unless Megatron divides the sum of the loss once, by the global token count."""
    if not config.calculate_per_token_loss:
        raise ValueError(
            "calculate_per_token_loss: got False; the schedule would divide each micro-batch's loss by its own tokens, "
            "a mean of means, where the loss is a sum that is divided once by the global count; set it to True"
        )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Wall time of a phase on this rank, up to the end of what it put to work on the device."""
    beat(phase)
    torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    torch.cuda.synchronize()
    seconds[phase] = time.perf_counter() - start
