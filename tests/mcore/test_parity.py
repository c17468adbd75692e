"""Megatron at every layout against plain torch over `transformers`' Qwen3: losses, gradients, changes of weights."""

import copy
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_paint.base.keys import derive_key
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import LAYOUTS, PIPELINES, run_worker
from tests.support.plain_policy import PlainPolicy

RANK, ALPHA = 4, 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    parity.make_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """Output folder of a case at a layout: one process group runs all cases of a part (`parity_cases.part_of`)."""
    made = {}

    def of(layout: str, name: str) -> Path:
        part = parity.part_of(layout, name)
        if (layout, part) not in made:
            out = made[layout, part] = tmp_path_factory.mktemp(f"{layout}-{part}")
            run_worker("parity_worker", layout, checkpoints, out, part)
        return made[layout, part]

    return of


def at_all_layouts(names: Iterable[str], *, pipelines: bool = False) -> list:
    """(layout, case) for a test; `make test` leaves out the cases that do not touch a layout."""
    pairs = list(itertools.product(LAYOUTS, names))
    pairs += [(layout, case.name) for layout in PIPELINES for case in parity.cases_at(layout) if pipelines]
    marks = [() if parity.touches(*pair) else pytest.mark.long for pair in pairs]
    return [pytest.param(*pair, marks=mark, id="-".join(pair)) for pair, mark in zip(pairs, marks, strict=True)]


def plain_model(case: parity.Case, checkpoints: Path, name: str):
    model = Qwen3ForCausalLM.from_pretrained(parity.checkpoint(checkpoints, name, case.tied, case.yarn, case.layers))
    if not case.lora:
        return model
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(parity.LORA_TARGETS)))
    with torch.no_grad():
        for long_name, p in model.named_parameters():
            if "lora_" in long_name:
                p.copy_(parity.adapter_value(short_name(long_name), p.shape))
    return model


def short_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


@pytest.fixture(scope="module")
def plain(checkpoints):
    """Results of plain torch by case, computed once."""
    torch.set_num_threads(1)
    results = {}
    for case in (*parity.CASES, *parity.DEEP_CASES.values()):
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
            gradients.append({short_name(n): g for n, g in updates[0][1].items()})
            for step_losses, step_gradients, cut in updates:
                losses.append(step_losses)
                norms.append(torch.stack([g.norm() for g in step_gradients.values()]).norm().item())
                clipped.append(cut)
        results[case.name] = {
            "losses": losses,
            "gradients": gradients,
            "norms": norms,
            "hidden": hidden,
            "logprobs": logprobs,
            "clipped": clipped,
            "before": before,
            "after": exported(policy.model, case),
        }
    return results


def start_teacher(policy: PlainPolicy, case: parity.Case, checkpoints: Path) -> None:
    """Initial, current and average weights differ from the first step on."""
    policy.start = Qwen3ForCausalLM.from_pretrained(
        parity.checkpoint(checkpoints, "moved" if case.lora else "start", case.tied, case.yarn, case.layers)
    )
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
    generator = torch.Generator().manual_seed(derive_key("lora", 1, int(parts[2]), parts[4]))
    bound = p.shape[1] ** -0.5
    return torch.empty_like(p).uniform_(-bound, bound, generator=generator)


def exported(model, case: parity.Case) -> dict[str, torch.Tensor]:
    if case.lora:
        model = copy.deepcopy(model).merge_and_unload()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    if case.tied:
        state.pop("lm_head.weight", None)
    return state


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


CASES = {case.name: case for case in (*parity.CASES, *parity.DEEP_CASES.values())}


@pytest.mark.parametrize(("layout", "name"), at_all_layouts(parity.BY_NAME, pipelines=True))
def test_equals_plain_torch(layout, name, outputs, plain):
    case, out, wanted = CASES[name], outputs(layout, name), plain[name]
    found = torch.load(out / f"{name}.pt")
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
    assert len({path.stat().st_mode for path in (out / name).iterdir()}) == 1
    after = exported(Qwen3ForCausalLM.from_pretrained(out / name), parity.CASES[0])
    if case.tied:
        after.pop("lm_head.weight", None)
    for weight, tensor in wanted["after"].items():
        change = tensor - wanted["before"][weight]
        if case.lora and not any(f".{t}." in weight for t in parity.LORA_TARGETS):
            assert torch.equal(after[weight], wanted["before"][weight]), weight
            continue
        assert change.norm() > 0, weight
        assert relative(after[weight] - wanted["before"][weight], change) < 1e-4, weight


@pytest.mark.parametrize(("layout", "name"), at_all_layouts(parity.NOT_FINITE))
def test_what_is_not_finite_touches_nothing(layout, name, outputs):
    """It stops all ranks alike, and names a loss by rank, micro-batch and problem; weights, optimiser and teacher stay,
    and the updates after it are, to the bit, those of a policy that never met it."""
    told = torch.load(outputs(layout, name) / "not_finite.pt")[name]
    assert all(entry["told"] == told[0]["told"] for entry in told)
    loss, gradient = told[0]["told"]
    assert re.fullmatch(r"loss is not finite on rank \d+, micro-batch \d+, problem '2'", loss)
    assert re.fullmatch(r"the gradient's norm is (nan|inf)", gradient)
    for entry in told:
        assert entry["stays"] == [True, True]
        assert entry["continues"]
        assert entry["moves"]


def test_grpo_s_clip_is_met(plain):
    """The second update clips some tokens and not all, so that a clip that does nothing cannot pass."""
    tokens = sum(len(response) for *_, response in parity.step_samples(0))
    first, second = plain["grpo-kl-sgd"]["clipped"][:2]
    assert first == 0
    assert 0 < second < tokens


def test_teacher_kinds_differ(plain):
    """The teacher kinds give different losses, so a teacher that is not the one asked for cannot pass."""
    first = {case.name: plain[case.name]["losses"][0] for case in parity.CASES}
    full = [first[name][0] for name in ("full-one-sample", "full-tied-ema-adam", "full-current-distributed-adam")]
    assert min(abs(a - b) for a, b in itertools.combinations(full, 2)) > 1e-3
    lora = torch.tensor([first["lora-initial-adam"], first["lora-current-distributed-adam"]])
    assert (lora[0] - lora[1]).abs().min() > 1e-3
