"""Parity cases in plain torch over `transformers`: what `test_parity.py` compares Megatron with."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_paint.base.keys import derive_key
from tests.mcore import parity_cases as parity
from tests.support.plain_policy import PlainPolicy

RANK, ALPHA = 4, 8


def plain_run(case: parity.Case, checkpoints: Path) -> dict:
    """All steps of a case."""
    policy = PlainPolicy(
        plain_model(case, checkpoints, "moved"),
        teacher=case.teacher,
        ema_decay=parity.EMA_DECAY,
        ema_anchor=case.ema_anchor,
        optimizer=case.optimizer,
        lr=case.lr,
        eps=case.eps,
        clip=case.clip_grad,
        weight_decay=case.weight_decay,
    )
    start_teacher(policy, case, checkpoints)
    before = exported(policy.model, case)
    losses, gradients, norms, clipped = [], [], [], []
    keys = [derive_key(index, "positions") for index in range(case.num_samples)]
    hidden = policy.teacher_hidden(parity.step_samples(0)[: case.num_samples]) if case.has_teacher_prompt else {}
    pairs = [(teacher, response) for _, teacher, _, response in parity.step_samples(0)[: case.num_samples]]
    logprobs = {w: policy.logprobs(pairs, weights=w) for w in ("teacher", "current")} if hidden else {}
    for step in range(parity.STEPS):
        samples = parity.step_samples(step)[: case.num_samples]
        olds = [case.older(index, len(row[-1])) for index, row in enumerate(samples)]
        if case.teacher == "none":
            samples = [(student, None, None, response) for student, *_, response in samples]
        if case.grpo is None:
            given = {"keys": keys, "olds": olds, "limit": case.importance_limit, **case.loss_settings}
            updates = [(*policy.train_step(samples, **given), 0)]
        else:
            updates = policy.grpo_step(
                samples,
                advantages=parity.ADVANTAGES,
                olds=olds,
                samplers=[parity.sampler_logprobs(i, len(row[-1])) for i, row in enumerate(samples)],
                settings=case.grpo,
                temperature=parity.GRPO_TEMPERATURE,
            )
        gradients.append(by_expert({short_name(n): g for n, g in updates[0][1].items()}))
        for step_losses, step_gradients, cut in updates:
            losses.append(step_losses)
            norms.append(torch.stack([g.norm() for g in step_gradients.values()]).norm().item())
            clipped.append(cut)
    return {
        "losses": losses,
        "gradients": gradients,
        "norms": norms,
        "hidden": hidden,
        "logprobs": logprobs,
        "clipped": clipped,
        "before": before,
        "after": exported(policy.model, case),
    }


def plain_model(case: parity.Case, checkpoints: Path, name: str):
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint(checkpoints, name))
    if not case.lora:
        return model
    from peft import LoraConfig, get_peft_model

    targets = {"target_modules": list(parity.LORA_TARGETS[:4] if case.experts else parity.LORA_TARGETS)}
    if case.adapts_experts:
        targets["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, **targets))
    with torch.no_grad():
        for long_name, p in model.named_parameters():
            if "lora_" in long_name:
                p.copy_(parity.adapter_value(short_name(long_name), p.shape))
    return model


def short_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def start_teacher(policy: PlainPolicy, case: parity.Case, checkpoints: Path) -> None:
    """Initial, current and average weights differ from the first step on."""
    policy.start = AutoModelForCausalLM.from_pretrained(case.checkpoint(checkpoints, "moved" if case.lora else "start"))
    if case.lora:
        # The adapters were zero when the average began: half the adapters now is what one step of it gives.
        with torch.no_grad():
            for name, p in policy.average.named_parameters():
                if "lora_" in name:
                    p.copy_(fresh_adapter(name, p))
        policy.anchor = copy.deepcopy(policy.average)
    else:
        policy.average.load_state_dict(policy.start.state_dict())
        policy.anchor = policy.start
        with torch.no_grad():
            for mean, p in zip(policy.average.parameters(), policy.model.parameters(), strict=True):
                mean.lerp_(p.lerp(mean, case.ema_anchor), 1 - parity.EMA_DECAY)  # here still the start


def fresh_adapter(name: str, p: torch.Tensor) -> torch.Tensor:
    """What our adapters start from: B zero, A drawn from its key."""
    if "lora_B" in name:
        return torch.zeros_like(p)
    parts = short_name(name).split(".")
    if "experts" in parts:
        return fresh_expert_adapter("gate_up_proj" if "base_layer" in parts else "down_proj", int(parts[2]), p)
    generator = torch.Generator().manual_seed(derive_key("lora", 1, int(parts[2]), parts[4]))
    bound = p.shape[1] ** -0.5
    return torch.empty_like(p).uniform_(-bound, bound, generator=generator)


def fresh_expert_adapter(stacked: str, layer: int, p: Tensor) -> Tensor:
    """A of all experts: one expert's rows after another's, each drawn from its key."""
    experts = p.unflatten(0, (-1, RANK)).clone()
    bound = p.shape[1] ** -0.5
    for number, a_KI in enumerate(experts):
        generator = torch.Generator().manual_seed(derive_key("lora", 1, layer, stacked, number))
        a_KI.uniform_(-bound, bound, generator=generator)
    return experts.flatten(0, 1)


def exported(model, case: parity.Case) -> dict[str, torch.Tensor]:
    if case.lora:
        model = copy.deepcopy(model).merge_and_unload()
    state = {n: t.clone() for n, t in by_expert(model.state_dict()).items()}
    if case.tied:
        state.pop("lm_head.weight", None)
    return state


def by_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the projections of each expert, which `transformers` 5 stacks."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            found |= {f"{stem}.{expert}.{part}.weight": value for part, value in parts.items()}
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    """0 where both are zeros: an expert without a token has no gradient."""
    return float((found - wanted).norm() / wanted.norm()) if found.any() or wanted.any() else 0.0


def assert_equals_plain(case: parity.Case, out: Path, wanted: dict) -> None:
    """What Megatron's run of a case wrote to `out` is the plain run `wanted`."""
    found = torch.load(out / f"{case.name}.pt")
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(wanted["losses"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(wanted["norms"]), rtol=1e-5, atol=0)
    if case.grpo is not None:
        assert found["clipped"] == wanted["clipped"]
    assert found["hidden"].keys() == wanted["hidden"].keys()
    for index, hidden in wanted["hidden"].items():
        assert relative(found["hidden"][index], hidden) < 1e-5, index
    assert found["logprobs"].keys() == wanted["logprobs"].keys()
    for weights, logprobs in wanted["logprobs"].items():
        for mine, wished in zip(found["logprobs"][weights], logprobs, strict=True):
            assert mine == pytest.approx(wished, abs=1e-5), weights
    for step, gradients in enumerate(found["gradients"]):
        expected = {n: g for n, g in wanted["gradients"][step].items() if not (case.tied and n == "lm_head.weight")}
        assert gradients.keys() == expected.keys()
        for weight, gradient in gradients.items():
            assert relative(gradient, expected[weight]) < 1e-5, (step, weight)
    assert len({path.stat().st_mode for path in (out / case.name).iterdir()}) == 1
    after = exported(AutoModelForCausalLM.from_pretrained(out / case.name), dataclasses.replace(case, lora=False))
    for weight, tensor in wanted["after"].items():
        change = tensor - wanted["before"][weight]
        if not case.changes(weight):
            assert torch.equal(after[weight], wanted["before"][weight]), weight
            continue
        if case.adapts_experts and ".experts." in weight:  # few tokens: a change may be less than a merge rounds
            assert (after[weight] - tensor).norm() <= 1e-4 * change.norm() + 1e-7 * tensor.norm(), weight
            continue
        assert change.norm() > 0 or ".experts." in weight, weight
        assert relative(after[weight] - wanted["before"][weight], change) < 1e-4, weight
