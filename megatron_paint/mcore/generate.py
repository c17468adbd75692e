"""Sampling from the Megatron model in this process: batched decoding over tensor-parallel ranks and pipeline stages.

Every stage runs the same loop. Hidden states travel from stage to stage, with a virtual pipeline once around for each
chunk of a stage. The last stage sends the chosen tokens back.

Axes: R rows of a batch, L rows of it that are still decoded, T tokens of a call, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_paint.mcore.attention import KeyValueCache, TokenRows, next_token_rows, token_rows
from megatron_paint.mcore.batch import assign_replicas
from megatron_paint.mcore.collectives import gather_entries
from megatron_paint.mcore.decoded_rows import DecodedRows
from megatron_paint.mcore.fixed_steps import BUCKET, Capture, FixedSteps, Step
from megatron_paint.mcore.float32_product import Float32Product
from megatron_paint.mcore.lock_step import LockStep
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.mcore.response_rows import response_rows
from megatron_paint.mcore.sampling import choose_tokens
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.runtime.heartbeat import mark_progress
from megatron_paint.runtime.work import Work, work

COMPACT_AT = 0.25  # fraction of finished rows at which a batch drops them; ours
COMPACT_CAPTURED_AT = 0.5  # the same where each number of rows is captured again; ours
LOOK_EVERY = 16  # tokens between two looks at a GPU: is a row finished? Ours. A look at a CPU is free


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much is decoded together by one copy of the weights."""

    rows: int
    prefill_tokens: int  # rows x longest prompt: attention pads prompts to a rectangle
    cache_tokens: int  # rows x last position of the longest response; one row is always allowed


class MegatronSampler:
    """Implements `Sampler` with the model that is trained; all copies of the weights share the requests."""

    def __init__(
        self,
        stage: Stage,
        ranks: Ranks,
        *,
        token_multiple: int,
        limits: BatchLimits,
        capture: Callable[[], Capture] | None = None,
    ):
        """capture: makes what captures the steps of a batch; None: every step launches its kernels."""
        self.stage = stage
        self.ranks = ranks
        self.token_multiple = token_multiple  # layout and FP8 require calls of a multiple of this many tokens
        self.limits = limits
        self.capture = capture
        self.bucket = BUCKET
        self.look_every = LOOK_EVERY if ranks.device.type == "cuda" else 1
        self.lock_step = LockStep(None, every=1)

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """One rollout per request, in order, on every rank."""
        self.stage.complete_weights()
        longest = [len(request.prompt_ids) + sampling.max_new_tokens for request in requests]
        mine = assign_replicas(longest, self.ranks.dp_cp_size)[self.ranks.dp_cp_rank]
        rollouts = self.generate_on_copy([requests[i] for i in mine], sampling)
        # One rank of a copy passes them on.
        sent = zip(mine, rollouts, strict=True) if self.ranks.tp_rank == 0 and self.ranks.is_last_stage else ()
        all_rollouts = gather_entries(dict(sent), self.ranks)
        return [all_rollouts[i] for i in range(len(requests))]

    def sync_weights(self, step: int) -> None:
        """Does nothing: sampler and trainer share their weights."""

    def release_memory(self) -> None:
        """Does nothing: there is no memory between calls."""

    def metrics(self) -> dict[str, float]:
        """Empty."""
        return {}

    @torch.no_grad()
    def generate_on_copy(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """One rollout per request, in order, on the ranks of this copy of the weights, which call together.

        Requests of similar length are decoded together. Replicas that share the experts of a mixture call together too,
        each with its own requests or with none.
        """
        self.stage.set_is_first_microbatch()  # otherwise Transformer Engine uses cached FP8 weights
        self.stage.eval()  # otherwise Megatron prepares each layer for recomputation
        self.lock_step = LockStep(self.ranks.step_group, every=self.look_every)
        try:
            rollouts = self._generate(requests, sampling)
            while self.lock_step.others_work():
                self._run_padding()
            return rollouts
        finally:
            self.stage.train()

    def _generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        rollouts: dict[int, Rollout] = {}
        batches = self._batches([(i, requests[i]) for i in by_length], sampling.max_new_tokens)
        total = len(requests) * sampling.max_new_tokens
        with work("sampling", total=total, unit="tokens", at_most=True) as tokens:
            for batch in batches:
                decoded = self._decode([request for _, request in batch], sampling, tokens)
                rollouts |= {index: rollout for (index, _), rollout in zip(batch, decoded, strict=True)}
                tokens.done = sum(len(rollout.response_ids) for rollout in rollouts.values())
                tokens.total = tokens.done + (len(requests) - len(rollouts)) * sampling.max_new_tokens
        return [rollouts[i] for i in range(len(requests))]

    def _batches(
        self, numbered: list[tuple[int, GenerationRequest]], max_new_tokens: int
    ) -> list[list[tuple[int, GenerationRequest]]]:
        """Cuts requests, sorted by prompt length, into batches."""
        limits = self.limits
        batches: list[list[tuple[int, GenerationRequest]]] = []
        for item in numbered:
            length = len(item[1].prompt_ids)
            rows = len(batches[-1]) + 1 if batches else 1
            fits = rows <= limits.rows and rows * length <= limits.prefill_tokens
            if not batches or not fits or rows * (length + max_new_tokens) > limits.cache_tokens:
                batches.append([])
            batches[-1].append(item)
        return batches

    def _decode(self, requests: list[GenerationRequest], sampling: SamplingParameters, tokens: Work) -> list[Rollout]:
        """One rollout per request of a batch. tokens: counts them."""
        lengths = [len(request.prompt_ids) for request in requests]
        # The last token is never an input, so the cache has no place for it.
        cache = KeyValueCache(rows=len(requests), length=max(lengths) + sampling.max_new_tokens - 1)
        logits = _Logits(self.stage, self.ranks, rows=len(requests), calls=sampling.max_new_tokens)
        batch = DecodedRows(requests, sampling, self.ranks.device)
        logits_LV = self._prefill(requests, cache, logits)
        step, compact_at = self._step(batch, cache), COMPACT_CAPTURED_AT if self.capture else COMPACT_AT
        while True:
            batch.add(*self._choose(logits_LV, batch.uniform, sampling))
            tokens.advance(len(batch.live))
            if batch.step == sampling.max_new_tokens:
                break
            if batch.step % self.look_every == 0:
                unfinished = batch.unfinished()
                if not unfinished:
                    break
                if len(batch.live) - len(unfinished) >= compact_at * len(batch.live):
                    cache.keep_rows(unfinished)
                    batch.keep(unfinished)
                    step = self._step(batch, cache)
            self._begin_call()
            hidden_T1H = step(batch.inputs, batch.positions, batch.end)
            logits_LV = logits.after_tokens(hidden_T1H, len(batch.live))
        return batch.rollouts()

    def _prefill(self, requests: list[GenerationRequest], cache: KeyValueCache, logits: "_Logits") -> Tensor | None:
        """The logits after the prompts, which it writes to the cache."""
        tokens = [token for request in requests for token in request.prompt_ids]
        lengths = [len(request.prompt_ids) for request in requests]
        padding = -len(tokens) % self.token_multiple
        rows = token_rows(lengths, padding=padding, device=self.ranks.device, cache=cache)
        self._begin_call()
        hidden_T1H = self._run_stages(torch.tensor(tokens + [0] * padding, device=self.ranks.device), rows)
        return logits.after_prompts(hidden_T1H, torch.tensor(lengths, device=self.ranks.device).cumsum(0) - 1)

    def _step(self, batch: DecodedRows, cache: KeyValueCache) -> Step:
        """A function that computes hidden states after the last tokens of the rows, which it writes to the cache."""

        def run(input_L: Tensor, position_L: Tensor, end: int) -> Tensor:
            padding = -len(input_L) % self.token_multiple
            rows = next_token_rows(position_L, end=end, padding=padding, cache=cache)
            return self._run_stages(F.pad(input_L, (0, padding)), rows)

        if self.capture is None:
            return run
        return FixedSteps(
            run,
            rows=len(batch.live),
            length=cache.length,
            device=self.ranks.device,
            capture=self.capture(),
            bucket=self.bucket,
        )

    def _run_padding(self) -> None:
        """A call whose result nobody reads."""
        ids_T = torch.zeros(self.token_multiple, dtype=torch.int64, device=self.ranks.device)
        self._begin_call()
        self._run_stages(ids_T, token_rows([], padding=self.token_multiple, device=self.ranks.device))

    def _begin_call(self) -> None:
        """Must be called before each call of the model."""
        mark_progress()
        self.lock_step.begin_call()

    def _run_stages(self, ids_T: Tensor, rows: TokenRows) -> Tensor:
        """Hidden states [T, 1, H] of this stage's last chunk. Those of each chunk are sent to the next one."""
        ranks, config = self.ranks, self.stage.config
        for chunk in self.stage.chunks:
            if not chunk.pre_process:
                tokens = len(ids_T) // (ranks.tp_size if config.sequence_parallel else 1)
                received = torch.empty((tokens, 1, config.hidden_size), dtype=config.params_dtype, device=ranks.device)
                dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=ranks.pp_group)
                chunk.set_input_tensor(received)
            hidden_T1H = chunk(ids_T, rows)
            if not chunk.post_process:
                dist.send(
                    hidden_T1H.contiguous(),
                    dst=parallel_state.get_pipeline_model_parallel_next_rank(),
                    group=ranks.pp_group,
                )
        return hidden_T1H

    def _choose(
        self, logits_LV: Tensor | None, uniform_L: Tensor, sampling: SamplingParameters
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of the rows, the same on every rank of the copy.

        One rank draws. The same arithmetic on another rank could round differently, and the ranks would diverge.
        """
        ranks = self.ranks
        chosen_2L = torch.empty((2, len(uniform_L)), dtype=torch.float64, device=ranks.device)
        if logits_LV is not None:
            token_L, logp_L = choose_tokens(logits_LV, uniform_R=uniform_L, sampling=sampling)
            chosen_2L = torch.stack((token_L.double(), logp_L.double()))
        if ranks.copy_size > 1:
            dist.broadcast(chosen_2L, group_src=(ranks.pp_size - 1) * ranks.tp_size, group=ranks.copy_group)
        return chosen_2L[0].long(), chosen_2L[1]


class _Logits:
    """The output layer of a batch. Logits are float32 [R, V] on the rank that draws tokens, None on the others.

    A call overwrites the logits of the last one. calls: at most so many calls are made.
    """

    def __init__(self, stage: Stage, ranks: Ranks, *, rows: int, calls: int) -> None:
        self.ranks = ranks
        self.sequence_parallel = stage.config.sequence_parallel
        self.vocabulary = stage.valid_vocab_size
        self.product = None  # only the last stage has an output layer
        if ranks.is_last_stage:
            self.product = Float32Product(stage.output_weight(), rows=rows, calls=calls)

    def after_prompts(self, hidden_T1H: Tensor, last_R: Tensor) -> Tensor | None:
        """last_R: where each row ends in T."""
        if self.product is None:
            return None
        return self._of(response_rows(hidden_T1H, last_R, self.ranks.tp_group if self.sequence_parallel else None))

    def after_tokens(self, hidden_T1H: Tensor, rows: int) -> Tensor | None:
        """T begins with one token for each row."""
        if self.product is None:
            return None
        if self.sequence_parallel:
            parts_L1H = hidden_T1H.contiguous()
            hidden_T1H = parts_L1H.new_empty((self.ranks.tp_size * len(parts_L1H), *parts_L1H.shape[1:]))
            dist.all_gather_into_tensor(hidden_T1H, parts_L1H, group=self.ranks.tp_group)
        return self._of(hidden_T1H[:rows, 0])

    def _of(self, hidden_RH: Tensor) -> Tensor | None:
        """The logits of the complete vocabulary, on tensor-parallel rank 0; None on the others."""
        ranks = self.ranks
        local_RV = self.product(hidden_RH)
        if ranks.tp_size == 1:
            return local_RV
        parts = [torch.empty_like(local_RV) for _ in range(ranks.tp_size)] if ranks.tp_rank == 0 else None
        dist.gather(local_RV, parts, group_dst=0, group=ranks.tp_group)
        return torch.cat(parts, dim=1)[:, : self.vocabulary] if parts else None
