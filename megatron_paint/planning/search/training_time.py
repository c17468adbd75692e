"""Seconds of the passes of a training step over the pipeline, of the reduction of gradients and of the optimiser."""

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_paint.planning.search.efficiency import HOST, HOST_MEMORY, LOGIT_PASSES, OPTIMIZER_BYTES, OVERLAP
from megatron_paint.planning.search.layer_time import WIDTH, LayerTime
from megatron_paint.planning.search.seconds import Seconds

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sequences of a pass."""

    sequences: int  # of all replicas
    length: float  # tokens of each
    micro_batch_tokens: int  # most tokens of a micro-batch; a longer sequence is one alone


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The work of the last stage after its layers."""

    tokens: float  # of each sequence that carry loss
    products: float  # with the output layer, in units of one forward product
    logit_sets: int


@dataclass(frozen=True, kw_only=True)
class TrainingTime:
    """Times of a layout. The stage that takes longest decides."""

    layer: LayerTime
    overlap: bool  # gradients are reduced while the backward pass runs
    on_host: bool = False  # the optimiser's state and its step
    instances: int = 1  # of the distributed optimiser: groups of replicas that each have the complete state

    @cached_property
    def stage_layers(self) -> tuple[float, ...]:
        """Layers of each stage."""
        layout, layers = self.layer.layout, self.layer.shape.num_layers
        if not layout.balanced:
            return (layers / layout.pp,) * layout.pp
        each = (layers + 2) / layout.pp
        ends = [int(stage == 0) + int(stage == layout.pp - 1) for stage in range(layout.pp)]
        return tuple(each - count for count in ends)

    def forward(self, batch: Batch) -> Seconds:
        """A pass without gradient."""
        count, tokens = self.micro_batches(batch)
        each = self.layer.forward(tokens, batch.length / 2)
        return self._pipeline(count, each, Seconds(), self._sent(tokens))

    def student(self, batch: Batch, loss: Loss) -> Seconds:
        """Forward, recomputation and backward pass, with the loss on the last stage."""
        count, tokens = self.micro_batches(batch)
        context = batch.length / 2
        each = self.layer.forward(tokens, context) + self.layer.recomputed(tokens, context)
        each += self.layer.backward(tokens, context)
        last = self.loss(tokens / batch.length * loss.tokens, loss)
        return self._pipeline(count, each, last, 2 * self._sent(tokens))

    def micro_batches(self, batch: Batch) -> tuple[int, float]:
        """The number of micro-batches of a replica, and the tokens of each, evenly spread."""
        sequences = math.ceil(batch.sequences / self.layer.layout.dp)
        together = max(1, int(batch.micro_batch_tokens // batch.length))
        count = math.ceil(sequences / together)
        return count, sequences / count * batch.length

    def loss(self, tokens: float, loss: Loss) -> Seconds:
        """Products with the output layer, and passes over the logits. Context-parallel ranks share the tokens."""
        layer, layout = self.layer, self.layer.layout
        rows, vocabulary = tokens / layout.cp, layer.shape.vocab_rows(layout.tp)
        return Seconds(
            products=loss.products * layer.product(rows, vocabulary * layer.shape.hidden_size),
            memory=layer.read(LOGIT_PASSES * loss.logit_sets * rows * vocabulary * FLOAT32),
        )

    def reduction(self, batch: Batch) -> Seconds:
        """Reduce-scatter of float32 gradients and all-gather of new weights; the first may hide behind a backward pass.

        Only the last micro-batch's backward pass can hide it.
        """
        shared, experts = self._trained
        groups = self.layer.groups
        gradients = groups.data.gather(shared * FLOAT32) + groups.expert_data.gather(experts * FLOAT32)
        if self.overlap:
            _, tokens = self.micro_batches(batch)
            hidden = OVERLAP * max(self.stage_layers) * self.layer.backward(tokens, batch.length / 2).total
            gradients = gradients.exposed(hidden)
        return gradients + groups.data.gather(shared * WIDTH) + groups.expert_data.gather(experts * WIDTH)

    def optimizer(self) -> Seconds:
        """The update of the shard of a rank. On the host, float32 gradients go there and new weights come back."""
        shared, experts = self._trained
        layout, gpu = self.layer.layout, self.layer.gpu
        weights = self.instances * (shared / (layout.dp * layout.cp) + experts / layout.expert_dp)
        if self.on_host:
            copied, stepped = 2 * FLOAT32 * weights, OPTIMIZER_BYTES * weights
            return Seconds(host=copied / (gpu.host * HOST) + stepped / (gpu.host_memory * HOST_MEMORY))
        return Seconds(memory=self.layer.read(OPTIMIZER_BYTES * weights))

    def copied_teacher(self) -> Seconds:
        """The copy of a teacher's weights from host memory."""
        return Seconds(host=sum(self._trained) * WIDTH / (self.layer.gpu.host * HOST))

    @cached_property
    def _trained(self) -> tuple[float, float]:
        """Trained weights of the rank with most: those that all replicas share, and experts."""
        layer, layers = self.layer, max(self.stage_layers)
        if layer.lora_rank is not None:
            return layers * layer.adapter_weights, 0.0
        table = layer.shape.vocab_rows(layer.layout.tp) * layer.shape.hidden_size
        tables = 2 if layer.layout.pp == 1 and not layer.shape.tied else 1
        return layers * layer.shared_weights + tables * table, layers * layer.expert_weights

    def _sent(self, tokens: float) -> Seconds:
        """What a stage sends to the next one in a forward pass, once for each of its chunks."""
        layout = self.layer.layout
        size = tokens / layout.cp / layout.tp * self.layer.shape.hidden_size * WIDTH
        return layout.vpp * self.layer.groups.stages.send(size)

    def _pipeline(self, count: int, each: Seconds, last: Seconds, sent: Seconds) -> Seconds:
        """`count` micro-batches through all stages. each: a layer's time; last: the time after the last layer.

        1F1B: the slowest stage works all the time except while the first micro-batch fills the pipeline and the last
        one drains it: (stages - 1) / chunks times the mean of the stages. A virtual pipeline takes micro-batches in
        groups of as many as stages. Where the last group is not full, a chunk still waits for all stages.
        """
        pp, layers = self.layer.layout.pp, self.stage_layers
        if self.layer.layout.vpp > 1:
            count += -count % pp
        stages = [number * each + (last if stage == pp - 1 else Seconds()) for stage, number in enumerate(layers)]
        slowest = max(stages, key=lambda stage: stage.total) + sent
        mean = sum(stage.total for stage in stages) / pp + sent.total
        return count * slowest + Seconds(bubble=(pp - 1) / self.layer.layout.vpp * mean)
