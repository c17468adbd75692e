"""Runs sequences through all pipeline stages and returns what the last stage computed from their hidden states.

Megatron's schedule drives the stages: forward alone, or forward and backward. With a virtual pipeline it is the
interleaved one, and each stage computes a micro-batch once for each of its chunks.
Axes: T tokens of a micro-batch (under sequence parallelism: this rank's slice), N response tokens of it, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_paint.mcore.batch import Assignment, MicroBatch, make_micro_batches
from megatron_paint.mcore.context import ContextGroup
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.mcore.response_rows import response_rows
from megatron_paint.policy import ScoredSequence
from megatron_paint.runtime.heartbeat import mark_progress
from megatron_paint.runtime.work import work

Result = TypeVar("Result")


class LossResult(NamedTuple, Generic[Result]):
    """A micro-batch's loss, in the order that Megatron's schedule expects."""

    loss_sum: Tensor  # over the tokens that carry loss
    num_tokens: Tensor  # how many tokens those are, int32
    result: Result  # what `run_backward` returns for this micro-batch


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """One pass of sequences through the model. Every rank calls with the sequences of all replicas.

    Each replica computes its own sequences, packed into micro-batches. Its context-parallel ranks share the tokens, and
    each gets the response rows of the sequences that it owns. The callback is called with a micro-batch and
    the hidden states [N, H] that predict its response tokens, on the ranks of the last stage. Its results are returned
    in the order of the micro-batches; ranks of other stages return an empty list.
    """

    ranks: Ranks
    stage: Stage
    models: Sequence[nn.Module]  # the stage's chunks, in Megatron's data-parallel wrapper if they are trained
    micro_batch_tokens: int
    token_multiple: int

    @property
    def context(self) -> ContextGroup | None:
        """The ranks that share a micro-batch's tokens; None: one rank has all of them."""
        ranks = self.ranks
        if ranks.cp_size == 1:
            return None
        return ContextGroup(group=ranks.cp_group, rank=ranks.cp_rank, size=ranks.cp_size)

    @property
    def in_groups_of(self) -> int:
        """The number of micro-batches is a multiple of it: the interleaved schedule takes as many as stages at once."""
        return self.ranks.pp_size if len(self.models) > 1 else 1

    def run(
        self,
        sequences: Sequence[ScoredSequence],
        assignment: Assignment,
        on_last_stage: Callable[[MicroBatch, Tensor], Result],
    ) -> list[Result]:
        """Forward alone, without gradients."""
        self.stage.complete_weights()
        with torch.no_grad():
            return self._run(sequences, assignment, on_last_stage, forward_only=True)

    def run_backward(
        self,
        sequences: Sequence[ScoredSequence],
        assignment: Assignment,
        on_last_stage: Callable[[MicroBatch, Tensor], LossResult[Result]],
    ) -> list[Result]:
        """Forward and backward: adds to Megatron's gradient buffers and reduces them over all ranks.

        The gradient is that of the sum of the loss, divided once by the global number of tokens that carry it.
        """
        _check_normalisation(self.stage.config)
        with torch.enable_grad():
            return self._run(sequences, assignment, on_last_stage, forward_only=False)

    def _run(
        self,
        sequences: Sequence[ScoredSequence],
        assignment: Assignment,
        on_last_stage: Callable[[MicroBatch, Tensor], Result],
        *,
        forward_only: bool,
    ) -> list:
        def forward_step(batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable]:
            if model is self.models[0]:  # once a micro-batch, which a virtual pipeline computes in several calls
                mark_progress()
                begun.advance()
            batch = next(batches)

            def finish(hidden_T1H: Tensor, non_loss_data: bool = False) -> Result:
                return on_last_stage(batch, self._response_rows(hidden_T1H, batch))

            return model(batch.ids_L, batch.rows), finish

        batches = make_micro_batches(
            sequences,
            assignment,
            replica=self.ranks.dp_rank,
            limit=self.micro_batch_tokens,
            multiple=self.token_multiple,
            context=self.context,
            device=self.ranks.device,
            in_groups_of=self.in_groups_of,
        )
        name = "forward" if forward_only else "forward and backward"
        with work(name, total=len(batches), unit="micro-batches") as begun:
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in self.models],
                model=list(self.models),
                num_microbatches=len(batches),
                seq_length=self.token_multiple,  # the real lengths travel with the tensors
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _response_rows(self, hidden_T1H: Tensor, batch: MicroBatch) -> Tensor:
        # Under sequence parallelism the loss returns each rank's part of the gradient; the rows' backward sums them.
        group = self.ranks.tp_group if self.stage.config.sequence_parallel else None
        rows = response_rows(hidden_T1H, batch.predicting_N, group)
        return rows if batch.exchange is None else batch.exchange(rows)


def _check_normalisation(config: TransformerConfig) -> None:
    """ValueError unless Megatron divides the sum of the loss once, by the global number of tokens."""
    if not config.calculate_per_token_loss:
        raise ValueError(
            "calculate_per_token_loss: got False; the schedule would divide each micro-batch's loss by its own tokens, "
            "a mean of means, where the loss is a sum that is divided once by the global count; set it to True"
        )
