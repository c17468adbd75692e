"""Measures on every rank of a layout which bytes a run really allocates. Each rank writes a JSON file.

Every micro-batch has exactly as many tokens as the settings allow, and every token of it is a response token, so that
the estimate, which counts the most that is possible, must be met.
"""

import gc
import json
import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import Settings
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.losses.output_layer.products import Projection
from megatron_paint.mcore.attention import KeyValueCache
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import Ranks, joined_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.records import Problem, Rollout, Sample
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters

LENGTH = 127  # tokens of a sequence: a prompt of one token, and the response, whose last token is no input
PER_MICRO_BATCH = 2  # sequences
CHANGES = {
    "full": (),
    "full selective": ("megatron.recompute_granularity=selective",),
    "full recompute": (
        *("megatron.recompute_granularity=full", "megatron.recompute_method=uniform"),
        "megatron.recompute_num_layers=1",
    ),
    "lora": ("model.lora={rank: 8, alpha: 16}",),
    "lora recompute": (
        *("model.lora={rank: 8, alpha: 16}", "megatron.recompute_granularity=full"),
        *("megatron.recompute_method=uniform", "megatron.recompute_num_layers=2"),
    ),
    "ema": ("objective.teacher={weights: ema, ema_anchor: 0.1}", "megatron.use_distributed_optimizer=false"),
    "bfloat16": ("model.dtype=bfloat16",),
}


class Live:
    """Bytes of storages that something holds now, and the most that were ever held."""

    def __init__(self) -> None:
        self.now, self.peak = 0, 0
        self._holders: dict[int, int] = {}

    def add(self, tensor: torch.Tensor, holder: object) -> None:
        """Counts the tensor's storage while `holder` exists. Several holders of one storage count once."""
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not self._holders.get(key):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(holder, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.now -= size


class Saved:
    """A tensor that autograd saved for the backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def own_storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@contextmanager
def saved_tensors(weights: dict[int, int]) -> Iterator[Live]:
    """Counts what autograd saves inside, without weights."""
    live = Live()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        if tensor.untyped_storage().data_ptr() not in weights:
            live.add(tensor, saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield live


@contextmanager
def logits_buffers() -> Iterator[Live]:
    """Counts the buffers that hold logits. A projection owns its buffers."""
    live, rows = Live(), Projection._rows

    def taken(self, hidden_TH):
        values = rows(self, hidden_TH)
        live.add(values, self)
        return values

    with patch.object(Projection, "_rows", taken):
        yield live


@contextmanager
def caches() -> Iterator[list[int]]:
    """Bytes of the key-value cache after each layer's write."""
    found: list[int] = []
    write = KeyValueCache.write

    def written(self, *arguments):
        held = write(self, *arguments)
        found.append(sum(part.nbytes for layer in self.layers.values() for part in layer))
        return held

    with patch.object(KeyValueCache, "write", written):
        yield found


def samples(settings: Settings) -> list[Sample]:
    response = tuple(range(5, 5 + LENGTH))
    return [
        Sample(
            problem=Problem(id=str(i), problem="", solution="", answer=""),
            key=i,
            rollout=Rollout(problem_id=str(i), prompt_ids=(1,), response_ids=response),
            teacher_prompt_ids=(2,),
        )
        for i in range(settings.data.problems_per_step)
    ]


def optimizer_storages(policy: MegatronPolicy) -> dict[int, int]:
    """The optimiser's own tensors: moments, and main weights where they are not the model's."""
    tensors = []
    for part in policy.optimizer.chained_optimizers:
        inner = part.optimizer
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return own_storages(tensors)


def sample(policy: MegatronPolicy, settings: Settings, *, stop_ids: Collection[int] = ()) -> None:
    """Samples a batch with the longest prompts and responses that fit."""
    prompt = tuple(range(5, 5 + settings.data.micro_batch_tokens // settings.rollout.batch_size))
    requests = [GenerationRequest(problem_id=str(i), sample_index=0, prompt_ids=prompt, key=i) for i in range(2)]
    sampling = SamplingParameters(
        max_new_tokens=settings.rollout.max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop_ids=stop_ids
    )
    policy.sampler.generate_on_replica(requests, sampling)


def measure(settings: Settings, ranks: Ranks) -> dict[str, float]:
    policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
    weights = own_storages(policy.stage.parameters())
    gradients = own_storages(buffer.grad_data for buffer in policy.wrapped.buffers)
    step = samples(settings)
    objective = settings.objective
    loss = DistillationLoss(config=objective.loss, chunk_bytes=objective.chunk_bytes, token_temperature=1.0)
    states = policy.teacher_states(step, loss)
    with saved_tensors(weights | gradients) as saved, logits_buffers() as logits:
        policy.backward(step, loss, states)
    policy.update(step, loss, lr=1e-4)
    state = optimizer_storages(policy)
    taught = own_storages(t for held in policy.teacher._sets.values() for t in held.values())
    results = [*(states.hidden_NH or {}).values()]
    if states.output_weight_VH is not None and states.output_weight_VH.data_ptr() not in weights | taught:
        results.append(states.output_weight_VH)  # a copy in the student's type
    with caches() as cache:  # made for the complete responses; that each ends with its first token saves time
        sample(policy, settings, stop_ids=range(policy.shape.vocab_size))
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimiser": sum(size for key, size in state.items() if key not in weights),
        "teacher": sum(taught.values()),
        "activations": saved.peak,
        "logits": logits.peak,
        "key-value cache": max(cache),
        "teacher's results": sum(own_storages(results).values()),
    }


class Allocations(TorchDispatchMode):
    """Follows every storage that an operation makes: the bytes that are alive, and the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.is_mkldnn:  # oneDNN's layout, without a storage
                self._add(value, id(value), value.numel() * value.element_size())
            elif isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self._sizes:
                storage = value.untyped_storage()
                self._add(storage, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _add(self, holder: object, key: int, size: int) -> None:
        self._sizes[key] = size
        self.now += size
        weakref.finalize(holder, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most bytes that are alive while `work` runs, with everything that exists before."""
        gc.collect()
        self.peak = self.now
        self.kept = work()
        return self.peak


def measure_peaks(settings: Settings, ranks: Ranks) -> dict[str, int]:
    """All bytes of the process's tensors in each moment of a run."""
    torch.set_num_threads(1)  # the loss has a tile for each thread
    objective, step = settings.objective, samples(settings)
    loss = DistillationLoss(config=objective.loss, chunk_bytes=objective.chunk_bytes, token_temperature=1.0)
    with Allocations() as live:
        policy = MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks)
        policy.update(step, loss, lr=1e-4)  # makes the optimiser's state
        taught = live.peak_of(lambda: policy.teacher_states(step, loss))
        trained = live.peak_of(partial(policy.backward, step, loss, live.kept))
        sampled = live.peak_of(lambda: sample(policy, settings))
    return {"teacher's pass": taught, "student's pass": trained, "sampling": sampled}


def main() -> None:
    """parts|peaks SETTINGS FOLDER CASE...: measures the cases, one after another, in this process group."""
    what, file, folder, *cases = sys.argv[1:]
    work = {"parts": measure, "peaks": measure_peaks}[what]
    with joined_ranks(load_settings(file).megatron) as ranks:
        found = {case: work(load_settings(file, CHANGES[case]), ranks) for case in cases}
    stage = {"stage": ranks.pp_rank, "cases": found}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(stage))
