"""Seconds of a step of a candidate, by phase."""

from dataclasses import dataclass, replace

from megatron_paint.config.settings import Settings
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.search.candidate import Candidate
from megatron_paint.planning.search.layer_time import LayerTime
from megatron_paint.planning.search.machines import Gpu
from megatron_paint.planning.search.rollout_time import RolloutTime, server_cache_bytes, server_layout, transfer
from megatron_paint.planning.search.seconds import Seconds
from megatron_paint.planning.search.training_time import Batch, Loss, TrainingTime
from megatron_paint.planning.search.workload import Workload


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of the phases of a step. Masks and verdicts, which hosts compute, are not modelled."""

    phases: dict[str, Seconds]  # prompts, decoding, transfer, teacher, student, optimiser
    ahead: bool  # the next step's responses are sampled while this one trains

    @property
    def rollout(self) -> float:
        """Seconds of sampling."""
        return self.phases["prompts"].total + self.phases["decoding"].total

    @property
    def total(self) -> float:
        """Seconds of the step."""
        rest = sum(part.total for name, part in self.phases.items() if name not in ("prompts", "decoding"))
        return max(self.rollout, rest) if self.ahead else self.rollout + rest

    def by_kind(self) -> dict[str, float]:
        """Seconds of all phases, by what the GPU does."""
        return sum(self.phases.values(), Seconds()).parts()


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """The times of one workload on one kind of GPU."""

    settings: Settings  # without a layout
    shape: ModelShape
    gpu: Gpu
    work: Workload
    sampling_gpus: int  # of the vLLM servers, beside those of the ranks

    def step(self, candidate: Candidate) -> StepTime:
        """The time of a step at this layout."""
        lora = self.settings.model.lora
        layer = LayerTime(
            shape=self.shape,
            gpu=self.gpu,
            layout=candidate,
            fp8=self.settings.megatron.fp8 is not None,
            lora_rank=None if lora is None else lora.rank,
        )
        megatron = self.settings.megatron
        training = TrainingTime(
            layer=layer,
            overlap=megatron.overlap_grad_reduce,
            on_host=candidate.optimizer_offload or megatron.optimizer_cpu_offload,
            instances=megatron.num_distributed_optimizer_instances,
        )
        prompts, decoding, moved = self._rollout(layer)
        batch = self._batch(self.work.prompt)
        return StepTime(
            phases={
                "prompts": prompts,
                "decoding": decoding,
                "transfer": moved,
                "teacher": self._teacher(training),
                "student": self.work.updates * training.student(batch, self._loss()),
                "optimiser": self.work.updates * (training.reduction(batch) + training.optimizer()),
            },
            ahead=self.settings.rollout.ahead > 0,
        )

    def _batch(self, prompt: float) -> Batch:
        return Batch(
            sequences=self.work.sequences,
            length=prompt + self.work.response,
            micro_batch_tokens=self.settings.data.micro_batch_tokens,
        )

    def _loss(self) -> Loss:
        return Loss(tokens=self.work.response, products=self.work.output_products, logit_sets=self.work.logit_sets)

    def _teacher(self, training: TrainingTime) -> Seconds:
        work, found = self.work, Seconds()
        if work.teacher_passes:
            found += work.teacher_passes * training.forward(self._batch(work.teacher_prompt))
        if work.initial_passes:
            found += work.initial_passes * training.forward(self._batch(work.prompt))
        if training.layer.layout.teacher_offload:
            found += training.copied_teacher()
        return found

    def _rollout(self, layer: LayerTime) -> tuple[Seconds, Seconds, Seconds]:
        """Sampling: prompts and decoding steps; and the transfer of weights to servers."""
        rollout, work, layout = self.settings.rollout, self.work, layer.layout
        if not work.new_tokens or rollout.engine == "replay":
            return Seconds(), Seconds(), Seconds()
        tokens = self.settings.data.micro_batch_tokens
        if rollout.engine == "vllm":
            served, servers = server_layout(layer, gpus=self.sampling_gpus)
            theirs = replace(layer, layout=served, fp8=False, lora_rank=None)
            times = RolloutTime(
                layer=theirs,
                host="vllm",
                replicas=servers,
                rows=rollout.vllm.requests,
                cache_bytes=server_cache_bytes(theirs, served),
            )
            return *times.seconds(work, prefill_tokens=tokens), transfer(layer)
        # While they sample, context-parallel ranks are replicas: each decodes its own batch.
        replicas = layout.dp * layout.cp
        times = RolloutTime(
            layer=replace(layer, layout=replace(layout, cp=1, dp=replicas)),
            host="trainer",
            replicas=replicas,
            rows=rollout.batch_size,
            cache_bytes=rollout.cache_bytes,
        )
        return *times.seconds(work, prefill_tokens=tokens), Seconds()
