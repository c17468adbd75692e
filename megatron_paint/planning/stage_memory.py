"""The memory of a rank in the moments of a run that need most of it.

A run has two such moments: a training step, and sampling. They are not at the same time, so neither the key-value cache
nor the activations are added to the other's peak. docs/memory.md explains every part and compares the numbers with hand
arithmetic and with measurements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_paint.config.offload import STATE_BYTES
from megatron_paint.config.settings import Settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.activations import (
    FLOAT32,
    LayerKind,
    Recompute,
    StageActivations,
    final_norm_bytes,
    stage_activations,
)
from megatron_paint.planning.fp8 import fp8_copy_bytes
from megatron_paint.planning.layout import WIDTHS, Layout, cache_bytes_per_token
from megatron_paint.planning.stages import in_flight
from megatron_paint.planning.weights import RankWeights, rank_weights

# Ours and not measured: a CUDA context with the kernels of torch, Transformer Engine and cuBLAS's workspaces, and the
# buffers of one NCCL communicator.
CUDA_BYTES = 0.9e9
NCCL_BYTES = 0.3e9
# Entries of a tile on a GPU and on a CPU with one thread, and its buffers: losses/output_layer/chunks.py.
TILE_ELEMENTS = {True: 2**23, False: 2**17}
TILE_BUFFERS = 6
PACKED_FROM = 16  # tokens of a batch from which its output layer is packed: mcore/float32_product.py
MOMENTS = {"adam": 2, "sgd": 1}  # float32 values that the optimiser stores of each weight; sgd: only with momentum


@dataclass(frozen=True, kw_only=True)
class Peak:
    """A moment of the run: bytes of what is in the memory of a rank's GPU, on the rank that needs most."""

    moment: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def micro_batch_tokens(settings: Settings, shape: ModelShape) -> int:
    """The most tokens of a micro-batch: data.micro_batch_tokens, or a longer response alone, without its prompt."""
    return max(settings.data.micro_batch_tokens, min(_new_tokens(settings, shape), shape.max_positions))


def _new_tokens(settings: Settings, shape: ModelShape) -> int:
    """Tokens of a response; without rollouts a solution's, which may have all tokens that a row may have."""
    if not settings.needs.samples_per_problem:
        return min(shape.max_positions, settings.data.max_tokens or shape.max_positions)
    return settings.rollout.max_new_tokens


class StageMemory:
    """The memory of one rank of a pipeline stage."""

    def __init__(
        self, settings: Settings, layout: Layout, *, stage: int, engine: bool, triton: bool, on_gpus: bool
    ) -> None:
        self.settings, self.layout, self.shape = settings, layout, layout.shape
        self.stage, self.triton, self.on_gpus = stage, triton, on_gpus
        self.tp, self.pp, self.dp = layout.tensor_parallel, layout.pipeline_parallel, layout.data_parallel
        self.cp = layout.context_parallel
        self.last = stage == self.pp - 1
        self.width = WIDTHS[settings.model.dtype]
        lora, megatron = settings.model.lora, settings.megatron
        self.weights: RankWeights = rank_weights(
            self.shape,
            tp=self.tp,
            pp=self.pp,
            stage=stage,
            layers=layout.split.count(stage),
            lora_rank=None if lora is None else lora.rank,
            ep=layout.expert_parallel,
            etp=layout.expert_tensor_parallel,
            adapts_experts=lora is not None and lora.experts,
            groups_experts=engine,
        )
        self.kind = LayerKind(
            shape=self.shape,
            width=self.width,
            tp=self.tp,
            etp=layout.expert_tensor_parallel,
            sequence_parallel=megatron.sequence_parallel,
            engine=engine,
            context=self.cp,
            lora_rank=None if lora is None else lora.rank,
            selective=megatron.recompute_granularity == "selective",
            adapts_experts=lora is not None and lora.experts,
        )
        self.recompute = Recompute(
            granularity=megatron.recompute_granularity,
            method=megatron.recompute_method,
            num_layers=megatron.recompute_num_layers,
        )

    def training(self) -> list[Peak]:
        """The moments of a training step that may need most."""
        held, activations = self._held(), self._activations()
        inputs, kept = (sum(chunk) for chunk in zip(*((a.inputs, a.kept) for a in activations), strict=True))
        final = final_norm_bytes(self.kind, tokens=self._rank_tokens()) if self.last else 0.0
        passed = self._teacher_results()
        backward = {
            "inputs of recomputed layers": inputs,
            "activations": kept + max(chunk.recomputed for chunk in activations),
            "working memory": max(chunk.working for chunk in activations) + self._weight_gradient(),
            "teacher's results": passed,
        }
        peaks = [Peak(moment="backward pass", parts={**held, **backward})]
        if self.last:
            loss = {
                "inputs of recomputed layers": inputs,
                "activations": kept + final,
                "output layer's gradient": self._output_gradient(),
                "logits": self.logits_bytes(),
                "tiles of the loss": self._tile_bytes(),
                "hidden states of responses": self._response_rows(),
                "teacher's results": passed,
            }
            peaks.append(Peak(moment="loss", parts={**held, **loss}))
        if self.settings.needs.teacher:
            teacher = {
                "teacher's copy": self.weights.trained * self._passing_bytes(),
                "working memory": math.ceil(self._teacher_tokens() / self.cp) * self.kind.forward_bytes(),
                "teacher's results": passed,
            }
            peaks.append(Peak(moment="teacher's pass", parts={**held, **teacher}))
        return peaks

    def resting(self) -> Peak:
        """What is in memory between passes: the optimiser's step and the copy of a checkpoint add nothing to it."""
        return Peak(moment="optimiser step", parts=self._held())

    def sampling(self) -> list[Peak]:
        """The moments in which responses are sampled; none if the run samples nothing."""
        peaks = []
        for moment, rows, new_tokens, nucleus in self._sampled():
            cache = self.cache_bytes(rows=rows, new_tokens=new_tokens)
            prefill = min(self.settings.data.micro_batch_tokens, rows * self.shape.max_positions)
            parts = {
                "key-value cache": cache,
                # Beside a step of the layers: one layer of the cache is copied when finished rows are dropped.
                "working memory": max(
                    prefill * replace(self.kind, context=1).forward_bytes(),
                    cache / max(1, self.layout.split.count(self.stage)),
                    0.0,
                ),
                "logits": self._sampling_logits(rows, nucleus) if self.last else 0.0,
                "packed output layer": self._packed_output_layer(new_tokens),
            }
            peaks.append(Peak(moment=moment, parts={**self._held(), **parts}))
        return peaks

    def optimizer_bytes(self) -> float:
        """The optimiser's state on the GPU: float32 main weights, unless the weights are float32, and its moments."""
        megatron = self.settings.megatron
        if megatron.optimizer_cpu_offload:
            return 0.0
        main = 0 if self.width == FLOAT32 else FLOAT32
        if megatron.use_precision_aware_optimizer:
            moments = STATE_BYTES[megatron.exp_avg_dtype] + STATE_BYTES[megatron.exp_avg_sq_dtype]
        else:
            moments = FLOAT32 * self._moments()
        return self._optimizer_weights() * (main + moments)

    def _optimizer_weights(self) -> float:
        """The weights whose optimiser state this rank has."""
        experts, shards = self.weights.trained_experts, (1, 1)
        if self.settings.megatron.use_distributed_optimizer:
            instances = self.settings.megatron.num_distributed_optimizer_instances
            shards = (self.dp * self.cp // instances, self.layout.expert_replicas // instances)
        return (self.weights.trained - experts) / shards[0] + experts / shards[1]

    def offloaded_bytes(self) -> float:
        """What the settings move to host memory: teacher, optimiser and activations.

        An optimiser in host memory also has a copy of its gradients there.
        """
        settings, found = self.settings, 0.0
        if settings.objective.teacher.offload:
            found += self.weights.trained * teacher_bytes(settings)
        if settings.megatron.optimizer_cpu_offload:
            found += self._optimizer_weights() * FLOAT32 * (1 + self._moments() + 1)
        if layers := self._offloaded_layers():
            one = stage_activations(self.kind, self.recompute, layers=layers, tokens=self._rank_tokens())
            found += one.kept
        return found

    def _offloaded_layers(self) -> int:
        """Layers whose activations wait in host memory: only on a single stage, and without recomputation."""
        megatron = self.settings.megatron
        return megatron.cpu_offloading_num_layers if megatron.cpu_offloading else 0

    def cache_bytes(self, *, rows: int, new_tokens: int) -> float:
        """The most bytes of keys and values of a batch of so many rows.

        A batch's prompts, padded to the longest, have at most data.micro_batch_tokens tokens, and all its rows at most
        rollout.cache_bytes on the largest stage. A single prompt above data.micro_batch_tokens is not counted.
        """
        settings, split = self.settings, self.layout.split
        largest = cache_bytes_per_token(self.shape, dtype=settings.model.dtype, megatron=settings.megatron)
        most = settings.rollout.cache_bytes // largest
        prompts = settings.data.micro_batch_tokens
        tokens = min(rows * new_tokens + prompts, rows * self.shape.max_positions, most)
        return float(tokens * largest * split.count(self.stage) / split.most)

    def logits_bytes(self) -> float:
        """Buffers of the loss: those of all response tokens of a micro-batch, or objective.chunk_bytes if that is less.

        Float32: the student's logits, and for distillation the teacher's; with several vocabulary shards those of two
        chunks; one buffer more for Triton's gradient.
        """
        objective = self.settings.objective
        sets = 1
        if objective.needs.masker:
            sets = 1 + self._teachers()
        buffers = sets * (2 if self.tp > 1 else 1) + self.triton
        row = self.shape.vocab_rows(self.tp) * FLOAT32
        tokens = self._response_tokens()
        if tokens * buffers * row > objective.chunk_bytes:
            return float(objective.chunk_bytes)
        return float(tokens * (sets + self.triton) * row)  # one chunk

    def _tile_bytes(self) -> float:
        """Temporaries of the loss without Triton, which works on tiles; they count within objective.chunk_bytes."""
        if self.triton:
            return 0.0
        chunk, logits = self.settings.objective.chunk_bytes, self.logits_bytes()
        entries = self._response_tokens() * self.shape.vocab_rows(self.tp)
        tile = min(TILE_ELEMENTS[self.on_gpus], entries) * TILE_BUFFERS * FLOAT32
        return min(tile, chunk / 2, chunk - logits)

    def saved(self) -> tuple[float, float]:
        """Bytes of this rank's part of a checkpoint in host memory: of experts and of the rest.

        Ranks that have the first copy of a weight save it. Weights, optimiser and the teacher's own weights. Megatron
        gathers the optimiser's shards of the other copies in host memory first, so they exist twice.
        """
        weights = self.weights
        copies = 2 if self.settings.megatron.use_distributed_optimizer else 1
        trained = FLOAT32 * (1 + self._moments()) * copies + teacher_bytes(self.settings)
        lora = self.settings.model.lora
        adapters = weights.trained_experts if lora is not None else 0
        experts = (weights.experts + adapters) * self.width + weights.trained_experts * trained
        every = (weights.base + weights.adapters) * self.width + weights.trained * trained
        return experts, every - experts

    def _held(self) -> dict[str, float]:
        """What the GPU holds all the time."""
        weights, teacher = self.weights, self.settings.objective.teacher
        resting = 0 if teacher.offload else teacher_bytes(self.settings)
        return {
            "weights": float(weights.base * self.width),
            "FP8 copies of weights": fp8_copy_bytes(
                self.settings.megatron, self.layout, stage=self.stage, engine=self.kind.engine
            ),
            "adapters": float(weights.adapters * self.width),
            "gradients": float(weights.trained * FLOAT32),
            "optimiser": self.optimizer_bytes(),
            "teacher": float(weights.trained * resting),
            "CUDA and NCCL": self._own_of_cuda(),
        }

    def _moments(self) -> int:
        optimizer = self.settings.optimizer
        return 0 if optimizer.name == "sgd" and not optimizer.momentum else MOMENTS[optimizer.name]

    def _own_of_cuda(self) -> float:
        groups = [self.tp, self.pp, self.dp * self.cp, self.cp, self.tp * self.pp if min(self.tp, self.pp) > 1 else 1]
        if self.shape.num_experts:
            groups += [self.layout.expert_parallel, self.layout.expert_replicas]
        return CUDA_BYTES + NCCL_BYTES * sum(size > 1 for size in groups) if self.on_gpus else 0.0

    def _passing_bytes(self) -> int:
        """Bytes of each trained weight in the teacher's pass: a copy of a float32 average or of weights on the host."""
        teacher, held = self.settings.objective.teacher, teacher_bytes(self.settings)
        rounded = teacher.weights == "ema" and self.width != FLOAT32
        return self.width if held and (teacher.offload or rounded) else 0

    def _activations(self) -> list[StageActivations]:
        """Of each chunk of layers, for all micro-batches between their forward and backward pass."""
        split, stage = self.layout.split, self.stage
        counts = in_flight(split, stage, micro_batches=self._sequences())  # a micro-batch has at least one sequence
        found = []
        for layers, count in zip(split.sizes(stage), counts, strict=True):
            # Before a layer saves its activations, those of another one have left the GPU.
            on_gpu = max(0, layers - self._offloaded_layers())
            one = stage_activations(self.kind, self.recompute, layers=on_gpu, tokens=self._rank_tokens())
            found.append(replace(one, inputs=count * one.inputs, kept=count * one.kept))
        return found

    def _sampled_sequences(self) -> int:
        """Responses of a step that one copy of the weights samples."""
        return math.ceil(self._responses() / (self.dp * self.cp))

    def _responses(self) -> int:
        """Responses of a step."""
        return self.settings.data.problems_per_step * (self.settings.needs.samples_per_problem or 1)

    def _sequences(self) -> int:
        """The most responses of a step that one replica trains on."""
        if self.settings.rollout.keep == "shortest_correct":  # one of each problem
            return math.ceil(self.settings.data.problems_per_step / self.dp)
        return math.ceil(self._responses() / self.dp)

    def _tokens(self) -> int:
        """The most tokens of a micro-batch on this replica."""
        return min(micro_batch_tokens(self.settings, self.shape), self._sequences() * self.shape.max_positions)

    def _rank_tokens(self) -> int:
        """Those of them that a rank has."""
        return math.ceil(self._tokens() / self.cp)

    def _teacher_tokens(self) -> int:
        """The same for the teacher's pass, where a response may come after a prompt that holds another one."""
        alone = min(self._new_tokens() * (1 + self.settings.needs.shown_responses), self.shape.max_positions)
        return max(self._tokens(), alone)

    def _new_tokens(self) -> int:
        return _new_tokens(self.settings, self.shape)

    def _response_tokens(self) -> int:
        """The most response tokens of a micro-batch that a rank owns: one response, or a share of all."""
        tokens, new_tokens = self._tokens(), self._new_tokens()
        share = min(tokens, max(new_tokens, math.ceil(tokens / self.cp)))
        return min(share, math.ceil(self._sequences() / self.cp) * new_tokens)

    def _response_rows(self) -> float:
        """Hidden states of the responses of a micro-batch: the student's, the teacher's, and the float32 gradient."""
        row = self.shape.hidden_size
        teachers = self._teachers()
        return self._response_tokens() * row * ((1 + teachers) * self.width + FLOAT32)

    def _teachers(self) -> int:
        """Passes without gradient over the responses: the teacher's, the full teacher's, the initial weights'."""
        objective = self.settings.objective
        if not objective.needs.teacher:
            return 0
        full = objective.needs.masker and objective.loss.partner == "full_teacher"
        return 1 + full + objective.needs.initial

    def _teacher_results(self) -> float:
        """The teacher's hidden states of all responses that the rank owns, on the last stage, and its output layer.

        Initial weights beside an average are a second output layer on the device if they rest in host memory.
        """
        if not self.last or not self._teachers():
            return 0.0
        tokens = math.ceil(self._sequences() / self.cp) * self._new_tokens()
        states = tokens * self.shape.hidden_size * self.width * self._teachers()
        trains_output = self.settings.model.lora is None
        teacher = self.settings.objective.teacher
        layers = 1 + (self.settings.needs.initial and teacher.offload and teacher.weights == "ema")
        return states + (layers * self.weights.output * self._passing_bytes() if trains_output else 0)

    def _weight_gradient(self) -> float:
        """The gradient of one product's weights, before Megatron adds it to its buffer. LoRA trains no matrix.

        That of a layer's largest matrix, or of the experts that Transformer Engine computes together.
        """
        return 0.0 if self.settings.model.lora else float(self.weights.largest * self.width)

    def _output_gradient(self) -> float:
        """The loss's float32 sum of the output layer's gradient; later zeros for Megatron's hook take less."""
        return 0.0 if self.settings.model.lora else float(self.weights.output * FLOAT32)

    def _sampled(self) -> list[tuple[str, int, int, bool]]:
        """What ranks sample: moment, rows of a batch, new tokens, whether top-p sorts the complete vocabulary."""
        rollout, evaluation = self.settings.rollout, self.settings.evaluation
        found = []
        if self.settings.needs.samples_per_problem and rollout.engine == "megatron":
            rows = min(rollout.batch_size, self._sampled_sequences())
            found.append(("rollouts", rows, rollout.max_new_tokens, rollout.top_k == 0 and rollout.top_p < 1))
        by_servers = self.settings.needs.samples_per_problem and rollout.engine == "vllm"
        if evaluation.problems is not None and not by_servers:
            new_tokens = min(evaluation.longest_answer, self.shape.max_positions - 1)
            nucleus = evaluation.top_k == 0 and evaluation.top_p < 1
            found.append(("evaluation", rollout.batch_size, new_tokens, nucleus))
        return found

    def _sampling_logits(self, rows: int, nucleus: bool) -> float:
        """On the rank that draws: float32 logits, log-probabilities and one copy; on a GPU top-p sorts in float64."""
        gathered = 2 + 1 / self.tp if self.tp > 1 else 1
        drawing = 15 if nucleus else 3
        return rows * self.shape.vocab_size * FLOAT32 * max(gathered, drawing)

    def _packed_output_layer(self, new_tokens: int) -> float:
        """On a CPU the sampler copies the output layer for a batch of many tokens (mcore/float32_product.py)."""
        packs = self.last and not self.on_gpus and new_tokens >= PACKED_FROM
        return float(self.shape.vocab_rows(self.tp) * self.shape.hidden_size * FLOAT32) if packs else 0.0


def teacher_bytes(settings: Settings) -> int:
    """Bytes that the teacher and the initial weights take for each trained weight; 0 if they share the weights."""
    teacher, width = settings.objective.teacher, WIDTHS[settings.model.dtype]
    if not settings.needs.teacher:
        return 0
    has_copy = settings.model.lora is None or settings.model.adapter_path is not None
    if teacher.weights == "initial":
        return width if has_copy else 0
    anchors = teacher.weights == "ema" and teacher.ema_anchor > 0
    initial = width if anchors or (settings.needs.initial and has_copy) else 0
    return (FLOAT32 if teacher.weights == "ema" else 0) + initial
