"""PAINT's update in plain torch over `transformers`' Qwen3: dense logits, autograd. Nothing of ours inside.

Axes: N response tokens, V vocabulary.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def response_logits(model, prompt_ids, response_ids) -> Tensor:
    """Logits [N, V] that predict the response."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    return model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]


def top_positions(gap_N: Tensor, fraction: float) -> Tensor:
    """The ceil(fraction * N) largest, earlier position first on ties."""
    count = math.ceil(fraction * len(gap_N) - 1e-9)
    order = sorted(range(len(gap_N)), key=lambda i: (-gap_N[i].item(), i))
    selected = torch.zeros(len(gap_N), dtype=torch.bool)
    selected[order[:count]] = True
    return selected


def random_positions(length: int, fraction: float, key: int) -> Tensor:
    """The ceil(fraction * N) positions with the smallest words of a Philox stream."""
    words = np.random.Philox(key=key).random_raw(length)
    selected = torch.zeros(length, dtype=torch.bool)
    selected[np.argsort(words, kind="stable")[: math.ceil(fraction * length - 1e-9)]] = True
    return selected


def entropy(logp_NV: Tensor) -> Tensor:
    return -(logp_NV.exp() * logp_NV).sum(-1)


def kl(logx_NV: Tensor, logy_NV: Tensor) -> Tensor:
    return (logx_NV.exp() * (logx_NV - logy_NV)).sum(-1)


def in_support(logits_NV: Tensor, settings: dict) -> Tensor:
    """Whether an entry's probability is at least the ratio of the largest one."""
    p_NV = torch.softmax(logits_NV.detach() / settings["temperature"], -1)
    return p_NV >= settings["support_ratio"] * p_NV.amax(-1, keepdim=True)


def prefix_weights(logits_NV: Tensor, response, old, *, temperature: float, limit: float) -> Tensor:
    """Of each token, how much more likely the tokens before it are now than when they were sampled."""
    now_NV = torch.softmax(logits_NV.detach() / temperature, -1)
    weights, product = [], 1.0
    for place, token in enumerate(response):
        weights.append(min(limit, product))
        product *= now_NV[place, token].item() / math.exp(old[place])
    return torch.tensor(weights, dtype=logits_NV.dtype)


def paint_loss(
    student_NV: Tensor,
    teacher_NV: Tensor,
    full_teacher_NV: Tensor,
    initial_NV: Tensor,
    *,
    key: int,
    weight_N: Tensor | float = 1.0,
    **settings,
):
    """(sum over the response of the divergence to the target, number of tokens that carry it)."""
    get = {"partner": "student", "positions": "top_fraction", "elsewhere": "teacher", "control": "none"} | settings
    temperature, weight = get["temperature"], get["weight"]
    logp = F.log_softmax(student_NV / temperature, -1)
    logq = F.log_softmax(teacher_NV / temperature, -1)
    gap = (entropy(logq) - entropy(logp.detach())).abs()
    selected = {
        "top_fraction": lambda: top_positions(gap, get["fraction"]),
        "threshold": lambda: gap > get["threshold_nats"],
        "random": lambda: random_positions(len(gap), get["fraction"], key),
    }[get["positions"]]()
    others = {"student": student_NV.detach(), "full_teacher": full_teacher_NV, "initial": initial_NV}
    partner_NV = others[get["partner"]]
    mixed = F.log_softmax(((1 - weight) * teacher_NV + weight * partner_NV) / temperature, -1)
    if get["control"] == "none":
        logq = torch.where(selected[:, None], mixed, logq)
    if get.get("support", "none") != "none":
        inside_NV = in_support(others[get["support"]], get)
        cut = torch.where(inside_NV, logq.exp(), 0.0)
        logq = (cut / cut.sum(-1, keepdim=True)).clamp(min=1e-300 if cut.dtype == torch.float64 else 1e-37).log()
    logq = logq.detach()
    if get.get("divergence") == "jsd":
        beta = get["jsd_beta"]
        logm = (beta * logq.exp() + (1 - beta) * logp.exp()).log()
        losses = beta * kl(logq, logm) + (1 - beta) * kl(logp, logm)
    else:
        terms = logq.exp() * (logq - logp)
        if get["clip"] is None:
            losses = terms.sum(-1)
        elif get.get("clip_rule") == "token":
            losses = terms.sum(-1)
            losses = torch.where(losses > get["clip"], get["clip"] * (1 + (losses / get["clip"]).log()), losses)
        else:
            losses = terms.clamp(max=get["clip"]).sum(-1)
    if get["control"] == "reweight":
        losses = torch.where(selected, (1 - weight) * losses, losses)
    losses = weight_N * losses
    if get["elsewhere"] == "skip":
        return (losses * selected).sum(), int(selected.sum())
    return losses.sum(), len(losses)


def grpo_loss(student_NV: Tensor, reference_NV: Tensor, response, *, advantage, sampler, old_N, temperature, settings):
    """(sum over the response of the clipped policy gradient with its KL, its log-probabilities, clipped tokens)."""
    ids = torch.tensor(response)[:, None]
    logp_N = F.log_softmax(student_NV / temperature, -1).gather(1, ids)[:, 0]
    old_N = logp_N.detach() if old_N is None else old_N
    ratio_N = (logp_N - old_N).exp()
    low, high = 1 - settings.get("clip_low", 0.2), 1 + settings.get("clip_high", 0.2)
    gained = ratio_N * advantage
    cut = (ratio_N > high) if advantage > 0 else (ratio_N < low)
    gained = torch.where(cut, torch.full_like(gained, (high if advantage > 0 else low) * advantage), gained)
    if settings.get("importance_limit"):
        gained = gained * (old_N.exp() / torch.tensor(sampler).exp()).clamp(max=settings["importance_limit"])
    losses = -gained
    if settings.get("kl_weight"):
        reference_N = F.log_softmax(reference_NV / temperature, -1).gather(1, ids)[:, 0]
        quotient = reference_N.exp() / logp_N.exp()
        losses = losses + settings["kl_weight"] * (quotient - quotient.log() - 1)
    return losses, logp_N.detach(), int(cut.sum())


class PlainPolicy:
    """Student, teacher and optimiser of one process; `train_step` returns losses and gradients before the step."""

    def __init__(
        self,
        model,
        *,
        teacher: str,
        ema_decay: float = 0.5,
        ema_anchor: float = 0.0,
        optimizer: str = "sgd",
        lr=1e-2,
        eps=1e-8,
        clip=0.0,
        weight_decay=0.0,
    ):
        self.model = model
        self.teacher_kind = teacher
        self.ema_decay = ema_decay
        self.ema_anchor = ema_anchor
        self.clip = clip
        self.start = copy.deepcopy(model)
        self.average = copy.deepcopy(model)
        self.anchor = self.average
        trained = [p for p in model.parameters() if p.requires_grad]
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(trained, lr=lr)
        else:
            groups = [
                {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
                {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=lr, eps=eps)

    def teacher(self):
        return {"initial": self.start, "current": self.model, "ema": self.average}[self.teacher_kind]

    @torch.no_grad()
    def teacher_hidden(self, samples) -> dict[int, Tensor]:
        """Final hidden states [N, H] at the rows that predict each response."""
        found = {}
        for index, (_, prompt, _, response) in enumerate(samples):
            ids = torch.tensor([[*prompt, *response]])
            states = self.teacher()(input_ids=ids, output_hidden_states=True).hidden_states
            found[index] = states[-1][0, len(prompt) - 1 : -1]
        return found

    @torch.no_grad()
    def logprobs(self, sequences, *, weights) -> list[list[float]]:
        """Log-probabilities of the responses of (prompt, response) pairs under the teacher's or the current weights."""
        model = {"teacher": self.teacher(), "current": self.model}[weights]
        found = []
        for prompt, response in sequences:
            logp_NV = F.log_softmax(response_logits(model, prompt, response), -1)
            found.append([logp_NV[place, token].item() for place, token in enumerate(response)])
        return found

    def grpo_step(self, samples, *, advantages, samplers, olds, settings, temperature):
        """All updates on these samples: losses and gradient of each, and how many tokens were clipped."""
        olds = [None if old is None else torch.tensor(old) for old in olds]
        found, tokens = [], sum(len(response) for *_, response in samples)
        for _ in range(settings.get("updates_per_batch", 1)):
            self.optimizer.zero_grad()
            sums, total, clipped = [], 0.0, 0
            for index, (prompt, _, _, response) in enumerate(samples):
                with torch.no_grad():
                    reference = response_logits(self.start, prompt, response)
                losses, logp_N, cut = grpo_loss(
                    response_logits(self.model, prompt, response),
                    reference,
                    response,
                    advantage=advantages[index],
                    sampler=samplers[index],
                    old_N=olds[index],
                    temperature=temperature,
                    settings=settings,
                )
                if olds[index] is None:
                    olds[index] = logp_N
                clipped += cut
                if settings.get("normalisation") == "sequence_mean":
                    total = total + losses.mean() / len(samples)
                    sums.append(losses.mean() * tokens / len(samples))
                else:
                    total = total + losses.sum() / tokens
                    sums.append(losses.sum())
            total.backward()
            gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            self.optimizer.step()
            found.append(([loss.item() for loss in sums], gradients, clipped))
        return found

    def train_step(self, samples, *, keys, olds, limit, **loss_settings):
        """`samples`: (student prompt, teacher prompt or None for cross entropy, full teacher's prompt, response).

        keys: of their random positions. olds: log-probabilities of each response under older weights, or None.
        """
        self.optimizer.zero_grad()
        losses, tokens = [], 0
        for index, (student_prompt, teacher_prompt, full_prompt, response) in enumerate(samples):
            student = response_logits(self.model, student_prompt, response)
            if teacher_prompt is None:
                loss, carried = F.cross_entropy(student, torch.tensor(response), reduction="sum"), len(response)
            else:
                with torch.no_grad():
                    teacher = response_logits(self.teacher(), teacher_prompt, response)
                    full_teacher = response_logits(self.teacher(), full_prompt, response)
                    initial = response_logits(self.start, student_prompt, response)
                given = {"key": keys[index], **loss_settings}
                if (old := olds[index]) is not None:
                    scale = {"temperature": loss_settings["temperature"], "limit": limit}
                    given["weight_N"] = prefix_weights(student, response, old, **scale)
                loss, carried = paint_loss(student, teacher, full_teacher, initial, **given)
            losses.append(loss)
            tokens += carried
        (sum(losses) / tokens).backward()
        losses = [loss.item() for loss in losses]
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        if self.clip:
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.clip)
        self.optimizer.step()
        with torch.no_grad():
            followed = (self.average.parameters(), self.model.parameters(), self.anchor.parameters())
            for mean, p, anchor in zip(*followed, strict=True):
                mean.lerp_((1 - self.ema_anchor) * p + self.ema_anchor * anchor, 1 - self.ema_decay)
        return losses, gradients
