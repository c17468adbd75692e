"""The variants that benchmarks/loss.py measures: bare products, full logits in autograd, peers' losses, and ours.

Each variant computes the gradients of hidden states and of an output weight, for the forward KL at temperature 1.1
summed over tokens. Only ours also computes entropies, selection and interpolation, unless `plain` is given.
Axes: T tokens, V vocabulary columns of a rank, H hidden.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from megatron_paint.losses import InterpolationLossConfig, VocabAxis, fused_interpolation_loss
from megatron_paint.losses.output_layer.products import OutputLayerGradient, Projection

TEMPERATURE = 1.1
# The package that a variant needs, as pip names it.
# Options of our loss, measured by `--variants`.
OPTIONS = {
    "support": {"support": "initial"},
    "own-support": {"support": "student"},
    "initial": {"partner": "initial"},
    "weighted": {"token_weight": "divergence"},
}
PEERS = {"modelopt": "nvidia-modelopt", "swift": "ms-swift", "liger": "liger-kernel"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: the sizes of the complete problem, and how it is computed."""

    variant: str
    tokens: int
    vocab: int
    hidden: int
    rollout: int
    tp: int
    dtype: str
    device: str
    chunk_bytes: float
    frozen: bool
    repeats: int

    @property
    def float_type(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32


def what_is_missing(variant: str, device: str, tp: int) -> str | None:
    """Returns why a variant cannot run here; None if it can."""
    if variant == "triton" and (device != "cuda" or importlib.util.find_spec("triton") is None):
        return "needs CUDA and Triton"
    if variant == "liger" and (device != "cuda" or tp > 1):
        return "needs CUDA and one rank"
    module = {"modelopt": "modelopt", "swift": "swift", "liger": "liger_kernel"}.get(variant)
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{PEERS[variant]} is not installed"
    if variant in ("modelopt", "swift") and importlib.util.find_spec("megatron") is None:
        return "megatron-core is not installed"
    return None


def prepare(job: Job, vocab: VocabAxis) -> Callable[..., None]:
    """Returns a function of (data, plain=False) that fills the gradients of data.student_TH and data.weight_VH."""
    if job.variant == "gemms":
        return lambda data, plain=False: _bare_products(job, data)
    if job.variant in PEERS:
        peer = {"modelopt": _modelopt, "swift": _swift, "liger": _liger}[job.variant](job)
        return lambda data, plain=False: peer(data, vocab)
    if job.variant == "dense":
        return lambda data, plain=False: _dense(data, vocab)
    return lambda data, plain=False: _ours(job, data, vocab, plain=plain)


def _ours(job: Job, data: SimpleNamespace, vocab: VocabAxis, *, plain: bool) -> None:
    tokens, half = len(data.student_TH), max(1, job.rollout // 2)
    lengths = [job.rollout] * (tokens // job.rollout) + [tokens % job.rollout] * (tokens % job.rollout > 0)
    chunks = {"chunk_tokens": half} if job.variant in ("cut", "short") else {"chunk_bytes": job.chunk_bytes}
    positions = "none" if plain else ("random" if job.variant == "short" else "top_fraction")
    more = OPTIONS.get(job.variant, {})
    if plain and more:  # a support of everything and weights of 1 leave the loss as it is
        more = more | {"support_ratio": 1e-30, "token_weight_minimum": 1.0}
    config = InterpolationLossConfig(positions=positions, temperature=TEMPERATURE, **more)
    output = fused_interpolation_loss(
        data.student_TH,
        data.weight_VH,
        data.teacher_TH,
        lengths=lengths,
        config=config,
        vocab=vocab,
        initial_hidden_TH=data.initial_TH if config.needs_initial else None,
        rollout_keys=range(len(lengths)),
        kernel="triton" if job.variant == "triton" else "torch",
        **chunks,
    )
    output.loss_T.sum().backward()


def _bare_products(job: Job, data: SimpleNamespace) -> None:
    """On a GPU all rows at once in the inputs' type. On a CPU in chunks, because new memory would cost more."""
    student_TH, weight_VH = data.student_TH.detach(), data.weight_VH.detach()
    if job.device == "cuda":
        for hidden_TH in (data.teacher_TH, student_TH):
            dlogits_TV = hidden_TH @ weight_VH.T
        dlogits_TV @ weight_VH
        if not job.frozen:
            dlogits_TV.T @ student_TH
        return
    wants = (True, not job.frozen)
    gradient = OutputLayerGradient(student_TH, weight_VH, columns=len(weight_VH), dtype=job.float_type, wants=wants)
    rows_at_once = max(1, int(job.chunk_bytes) // (2 * job.float_type.itemsize * len(weight_VH)))
    project = Projection(weight_VH, job.float_type, most_rows=min(rows_at_once, len(student_TH)))
    for start in range(0, len(student_TH), rows_at_once):
        rows = slice(start, min(start + rows_at_once, len(student_TH)))
        project(data.teacher_TH[rows])
        gradient.put(rows, project(student_TH[rows]))


def _logits(data: SimpleNamespace, vocab: VocabAxis) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the full logits of student and teacher, as an output layer does. to_shards sums the hidden gradient."""
    with torch.no_grad():
        teacher_TV = data.teacher_TH @ data.weight_VH.T
    hidden_TH = data.student_TH if vocab.ranks == 1 else vocab.to_shards(data.student_TH)
    return hidden_TH @ data.weight_VH.T, teacher_TV


def _dense(data: SimpleNamespace, vocab: VocabAxis) -> None:
    """The loss of trainers on full logits. With several ranks, a log-softmax needs a maximum and a sum over them."""

    def log_softmax(logits_TV: torch.Tensor) -> torch.Tensor:
        logits_TV = logits_TV.float() / TEMPERATURE
        if vocab.ranks == 1:
            return torch.log_softmax(logits_TV, 1)
        logits_TV = logits_TV - vocab.max_shards(logits_TV.amax(1))[:, None]
        return logits_TV - vocab.to_shards(vocab.sum_shards(logits_TV.exp().sum(1)).log())[:, None]

    student_TV, teacher_TV = _logits(data, vocab)
    with torch.no_grad():
        target_logp_TV = log_softmax(teacher_TV)
    logp_TV = log_softmax(student_TV)
    vocab.sum_shards((target_logp_TV.exp() * (target_logp_TV - logp_TV)).sum(1)).sum().backward()


def _modelopt(job: Job) -> Callable[..., None]:
    """NVIDIA ModelOpt's LogitsKLLoss on [tokens, 1, V]. Its results are summed over ranks, as Megatron does."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=job.tp), temperature=TEMPERATURE)

    def run(data: SimpleNamespace, vocab: VocabAxis) -> None:
        student_TV, teacher_TV = _logits(data, vocab)
        loss_1T, _, _ = loss(student_TV[:, None], teacher_TV[:, None])
        vocab.sum_shards(loss_1T).sum().backward()

    return run


def _swift(job: Job) -> Callable[..., None]:
    """ms-swift's chunked divergence at beta 0, the forward KL, with its vocabulary-parallel log-softmax and KL."""
    divergence = _file_of("swift", "rlhf_trainers/gkd_loss.py")
    parallel = _file_of("swift", "megatron/trainers/vocab_parallel_utils.py")

    def run(data: SimpleNamespace, vocab: VocabAxis) -> None:
        student_TV, teacher_TV = (logits_TV.float() / TEMPERATURE for logits_TV in _logits(data, vocab))
        loss = divergence.jsd_loss(
            student_TV,
            teacher_TV,
            0,
            log_softmax_fn=parallel.vocab_parallel_log_softmax,
            kl_div_fn=parallel.vocab_parallel_kl_div,
        )
        loss.backward()

    return run


def _liger(job: Job) -> Callable[..., None]:
    """Liger's fused linear JSD with jsd_beta 0, which is the forward KL. It needs an output weight for both sides."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)

    def run(data: SimpleNamespace, vocab: VocabAxis) -> None:
        mean = loss(data.student_TH, data.weight_VH, data.teacher_TH, data.weight_VH.detach())
        (mean * len(data.student_TH)).backward()

    return run


def _file_of(package: str, path: str) -> ModuleType:
    """Imports one file of an installed package, without the package and its dependencies."""
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    name = f"benchmarked_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, root / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
