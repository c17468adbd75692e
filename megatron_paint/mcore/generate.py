"""Sampling from the Megatron model in this process: batched decoding over tensor-parallel ranks and pipeline stages.

Every stage runs the same loop. Hidden states travel from stage to stage. The last stage sends the chosen tokens back.

Axes: R rows of a batch, T tokens of a call, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_paint.base.keys import uniforms
from megatron_paint.mcore.attention import KeyValueCache, TokenRows, token_rows
from megatron_paint.mcore.batch import assign_replicas
from megatron_paint.mcore.collectives import gather_entries
from megatron_paint.mcore.model import Stage
from megatron_paint.mcore.ranks import Ranks
from megatron_paint.mcore.response_rows import response_rows
from megatron_paint.mcore.sampling import choose_tokens
from megatron_paint.records import Rollout
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.runtime.heartbeat import mark_progress

COMPACT_AT = 0.25  # fraction of finished rows at which a batch drops them; ours


@dataclass
class _Row:
    """A response that is being decoded."""

    request: GenerationRequest
    uniform: list[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # by a stop token

    def rollout(self) -> Rollout:
        return Rollout(
            problem_id=self.request.problem_id,
            sample_index=self.request.sample_index,
            prompt_ids=self.request.prompt_ids,
            response_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finished=self.finished,
        )


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much is decoded together on one replica."""

    rows: int
    prefill_tokens: int  # rows x longest prompt: attention pads prompts to a rectangle
    cache_tokens: int  # rows x last position of the longest response; one row is always allowed


class MegatronSampler:
    """Implements `Sampler` with the model that is trained; replicas share the requests."""

    def __init__(self, stage: Stage, ranks: Ranks, *, token_multiple: int, limits: BatchLimits):
        self.stage = stage
        self.ranks = ranks
        self.token_multiple = token_multiple  # layout and FP8 require calls of a multiple of this many tokens
        self.limits = limits

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """One rollout per request, in order, on every rank."""
        longest = [len(request.prompt_ids) + sampling.max_new_tokens for request in requests]
        mine = assign_replicas(longest, self.ranks.dp_size)[self.ranks.dp_rank]
        rollouts = self.generate_on_replica([requests[i] for i in mine], sampling)
        # One rank of a replica passes them on.
        sent = zip(mine, rollouts, strict=True) if self.ranks.tp_rank == 0 and self.ranks.is_last_stage else ()
        all_rollouts = gather_entries(dict(sent), self.ranks)
        return [all_rollouts[i] for i in range(len(requests))]

    def sync_weights(self, step: int) -> None:
        """Does nothing: sampler and trainer share their weights."""

    def metrics(self) -> dict[str, float]:
        """Empty."""
        return {}

    @torch.no_grad()
    def generate_on_replica(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        """One rollout per request, in order, on the ranks of this data-parallel replica, which call together.

        Requests of similar length are decoded together.
        """
        self.stage.set_is_first_microbatch()  # otherwise Transformer Engine uses cached FP8 weights
        self.stage.eval()  # otherwise Megatron prepares each layer for recomputation
        try:
            return self._generate(requests, sampling)
        finally:
            self.stage.train()

    def _generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParameters) -> list[Rollout]:
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        rollouts: dict[int, Rollout] = {}
        for batch in self._batches([(i, requests[i]) for i in by_length], sampling.max_new_tokens):
            rows = [_Row(request, uniforms(request.key, sampling.max_new_tokens).tolist()) for _, request in batch]
            self._decode(rows, sampling)
            rollouts |= {index: row.rollout() for (index, _), row in zip(batch, rows, strict=True)}
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

    def _decode(self, rows: list[_Row], sampling: SamplingParameters) -> None:
        """Fills the rows with tokens."""
        live = list(rows)
        prompts = [row.request.prompt_ids for row in rows]
        # The last token is never an input, so the cache has no place for it.
        cache = KeyValueCache(rows=len(rows), length=max(map(len, prompts)) + sampling.max_new_tokens - 1)
        logits_RV = self._call(
            [token for prompt in prompts for token in prompt], [len(p) for p in prompts], None, cache
        )
        for step in range(sampling.max_new_tokens):
            token_R, logp_R = self._choose(logits_RV, [row.uniform[step] for row in live], sampling)
            for row, token, logp in zip(live, token_R, logp_R, strict=True):
                if not row.finished:
                    row.tokens.append(token)
                    row.logprobs.append(logp)
                    row.finished = token in sampling.stop_ids
            unfinished = [i for i, row in enumerate(live) if not row.finished]
            if not unfinished or step + 1 == sampling.max_new_tokens:
                break
            if len(live) - len(unfinished) >= COMPACT_AT * len(live):
                cache.keep_rows(unfinished)
                live = [live[i] for i in unfinished]
            # A finished row repeats its last token until it is dropped; nothing reads the result.
            starts = [len(row.request.prompt_ids) + step for row in live]
            logits_RV = self._call([row.tokens[-1] for row in live], [1] * len(live), starts, cache)

    def _call(self, tokens: list[int], lengths: list[int], starts: list[int] | None, cache: KeyValueCache):
        """Runs the stages on new tokens.

        Returns float32 logits [R, V] after each row's last token on the rank that draws tokens; None on the others.
        """
        mark_progress()
        padding = -len(tokens) % self.token_multiple
        rows = token_rows(lengths, padding=padding, device=self.ranks.device, starts=starts, cache=cache)
        ids_T = torch.tensor(tokens + [0] * padding, device=self.ranks.device)
        hidden_T1H = self._run_stages(ids_T, rows)
        if not self.ranks.is_last_stage:
            return None
        last_R = torch.tensor(lengths, device=self.ranks.device).cumsum(0) - 1
        return self._logits(hidden_T1H, last_R)

    def _run_stages(self, ids_T: Tensor, rows: TokenRows) -> Tensor:
        ranks, config = self.ranks, self.stage.config
        if not ranks.is_first_stage:
            tokens = len(ids_T) // (ranks.tp_size if config.sequence_parallel else 1)
            received = torch.empty((tokens, 1, config.hidden_size), dtype=config.params_dtype, device=ranks.device)
            dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=ranks.pp_group)
            self.stage.set_input_tensor(received)
        hidden_T1H = self.stage(ids_T, rows)
        if not ranks.is_last_stage:
            dist.send(
                hidden_T1H.contiguous(),
                dst=parallel_state.get_pipeline_model_parallel_next_rank(),
                group=ranks.pp_group,
            )
        return hidden_T1H

    def _logits(self, hidden_T1H: Tensor, last_R: Tensor) -> Tensor | None:
        """The logits of the complete vocabulary, on tensor-parallel rank 0; None on the others."""
        group = self.ranks.tp_group if self.stage.config.sequence_parallel else None
        local_RV = float32_product(response_rows(hidden_T1H, last_R, group), self.stage.output_weight())
        if self.ranks.tp_size == 1:
            return local_RV
        parts = [torch.empty_like(local_RV) for _ in range(self.ranks.tp_size)] if self.ranks.tp_rank == 0 else None
        dist.gather(local_RV, parts, group_dst=0, group=self.ranks.tp_group)
        return torch.cat(parts, dim=1)[:, : self.stage.valid_vocab_size] if parts else None

    def _choose(self, logits_RV: Tensor | None, uniform: list[float], sampling: SamplingParameters):
        """Tokens and log-probabilities of the rows, the same on every rank of the replica.

        One rank draws. The same arithmetic on another rank could round differently, and the ranks would diverge.
        """
        ranks = self.ranks
        chosen_2R = torch.empty((2, len(uniform)), dtype=torch.float64, device=ranks.device)
        if logits_RV is not None:
            uniform_R = torch.tensor(uniform, dtype=torch.float64, device=ranks.device)
            token_R, logp_R = choose_tokens(logits_RV, uniform_R=uniform_R, sampling=sampling)
            chosen_2R = torch.stack((token_R.double(), logp_R.double()))
        if ranks.replica_size > 1:
            dist.broadcast(chosen_2R, group_src=(ranks.pp_size - 1) * ranks.tp_size, group=ranks.replica_group)
        token_R, logp_R = chosen_2R.tolist()
        return [int(token) for token in token_R], logp_R


def float32_product(hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
    """Logits in float32 from weights of any type. Rounding them to bfloat16 would change the draws."""
    if hidden_RH.is_cuda and hidden_RH.dtype != torch.float32:
        return torch.mm(hidden_RH, weight_VH.t(), out_dtype=torch.float32)
    return hidden_RH.float() @ weight_VH.float().t()
