"""PAINT's update in plain torch over `transformers`' Qwen3: dense logits, autograd. Nothing of ours inside.

Axes: N response tokens, V vocabulary.
"""

import copy
import math

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


def paint_loss(
    student_NV: Tensor,
    teacher_NV: Tensor,
    full_teacher_NV: Tensor,
    *,
    temperature,
    weight,
    fraction,
    partner,
    clip=None,
) -> Tensor:
    """Sum over the response of the clipped forward KL to the interpolated target."""
    logp = F.log_softmax(student_NV / temperature, -1)
    logq = F.log_softmax(teacher_NV / temperature, -1)
    entropy = lambda x: -(x.exp() * x).sum(-1)  # noqa: E731
    selected = top_positions((entropy(logq) - entropy(logp.detach())).abs(), fraction)
    partner_NV = {"student": student_NV.detach(), "full_teacher": full_teacher_NV}[partner]
    mixed = F.log_softmax(((1 - weight) * teacher_NV + weight * partner_NV) / temperature, -1)
    logq = torch.where(selected[:, None], mixed, logq).detach()
    terms = logq.exp() * (logq - logp)
    return (terms if clip is None else terms.clamp(max=clip)).sum()


class PlainPolicy:
    """Student, teacher and optimiser of one process; `train_step` returns losses and gradients before the step."""

    def __init__(
        self,
        model,
        *,
        teacher: str,
        ema_decay: float = 0.5,
        optimizer: str = "sgd",
        lr=1e-2,
        eps=1e-8,
        clip=0.0,
        weight_decay=0.0,
    ):
        self.model = model
        self.teacher_kind = teacher
        self.ema_decay = ema_decay
        self.clip = clip
        self.start = copy.deepcopy(model)
        self.average = copy.deepcopy(model)
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

    def train_step(self, samples, **loss_settings):
        """`samples`: (student prompt, teacher prompt or None for cross entropy, full teacher's prompt, response)."""
        self.optimizer.zero_grad()
        losses, tokens = [], sum(len(response) for *_, response in samples)
        for student_prompt, teacher_prompt, full_prompt, response in samples:
            student = response_logits(self.model, student_prompt, response)
            if teacher_prompt is None:
                loss = F.cross_entropy(student, torch.tensor(response), reduction="sum")
            else:
                with torch.no_grad():
                    teacher = response_logits(self.teacher(), teacher_prompt, response)
                    full_teacher = response_logits(self.teacher(), full_prompt, response)
                loss = paint_loss(student, teacher, full_teacher, **loss_settings)
            (loss / tokens).backward()
            losses.append(loss.item())
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        if self.clip:
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.clip)
        self.optimizer.step()
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(p, 1 - self.ema_decay)
        return losses, gradients
