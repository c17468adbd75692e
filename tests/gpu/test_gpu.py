"""What only a GPU can show: Transformer Engine's layers, bfloat16, FP8, the loss on CUDA.

Tolerances are those of bfloat16 (8 bits) and FP8 (3 bits) through two layers, relative to the values' norm.
"""

from dataclasses import replace

import pytest
import torch

from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.settings import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    Settings,
)
from megatron_paint.losses import (
    InterpolationLossConfig,
    WholeVocab,
    fused_interpolation_loss,
    interpolation_loss,
    token_logprobs,
)
from megatron_paint.losses.objectives import DistillationLoss
from megatron_paint.mcore.decoded_rows import DecodedRows
from megatron_paint.mcore.fixed_steps import CudaCapture
from megatron_paint.mcore.sampling import choose_tokens
from megatron_paint.planning.hardware import missing_for_engine
from megatron_paint.records import Problem, Rollout, Sample
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from tests.losses.losses_cases import options
from tests.mcore.eager_capture import EagerCapture
from tests.mcore.sampling_cases import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none was found"),
]

LOSS = DistillationLoss(config=InterpolationLossConfig(), chunk_bytes=1e8, token_temperature=1.1)
with_engine = pytest.mark.skipif(missing_for_engine() is not None, reason=f"{missing_for_engine()}")


def make_policy(folder, ranks, *, lora=None, **megatron):
    from megatron_paint.mcore.policy import MegatronPolicy
    from megatron_paint.models.qwen3.shape import read_shape

    settings = Settings(
        model=ModelSettings(hf_path=str(folder), dtype="bfloat16", lora=lora),
        data=DataSettings(train="unused", micro_batch_tokens=512),
        run=RunSettings(dir="unused"),
        megatron=MegatronSettings(**megatron),
    )
    return MegatronPolicy(settings, read_shape(folder), ranks)


def fill_adapters(policy):
    """Adapters that change what the model computes; they start as a change of nothing."""
    from megatron_paint.mcore.lora import adapters_of

    generator = torch.Generator().manual_seed(4)
    for adapters in adapters_of(policy.stage):
        for b_OK in adapters.b.values():
            b_OK.data.copy_(0.05 * torch.randn(b_OK.shape, generator=generator))


def samples(count=6):
    generator = torch.Generator().manual_seed(1)

    def draw(n):
        return tuple(torch.randint(0, 1024, (n,), generator=generator).tolist())

    drawn = [(draw(10 + 7 * i), draw(30 + 11 * i), draw(5 + 13 * i)) for i in range(count)]
    return [
        Sample(
            problem=Problem(id=str(i), problem="", solution="", answer=""),
            key=i,
            rollout=Rollout(problem_id=str(i), prompt_ids=prompt, response_ids=response),
            teacher_prompt_ids=teacher_prompt,
        )
        for i, (prompt, teacher_prompt, response) in enumerate(drawn)
    ]


def losses(policy, **changes):
    return torch.tensor([score.loss_sum for score in policy.evaluate_loss(samples(), LOSS, **changes)])


@with_engine
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=8, alpha=16)], ids=["full", "lora"])
def test_engine_layers_equal_local_ones(folder, ranks, lora):
    """Fused norms (full) and separate ones (LoRA) of Transformer Engine against plain torch."""
    engine = make_policy(folder, ranks, lora=lora, transformer_impl="transformer_engine")
    local = make_policy(folder, ranks, lora=lora, transformer_impl="local")
    if lora is not None:
        before = losses(local)
        fill_adapters(engine)
        fill_adapters(local)
        assert (losses(local) - before).norm() / before.norm() > 0.1
    found, wanted = losses(engine), losses(local)
    assert (found - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize("implementation", ["local", pytest.param("transformer_engine", marks=with_engine)])
def test_model_against_itself(folder, ranks, implementation):
    policy = make_policy(folder, ranks, transformer_impl=implementation)
    same = [replace(s, teacher_prompt_ids=s.student_prompt_ids) for s in samples()]
    scores = policy.evaluate_loss(same, LOSS, teach_itself=True)
    assert sum(s.loss_sum for s in scores) / sum(s.num_tokens for s in scores) < 1e-3


@with_engine
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_learns(folder, ranks, recipe):
    """Five steps on the same samples lower the loss, and the noise floor stays below it."""
    policy = make_policy(folder, ranks, fp8="hybrid", fp8_recipe=recipe)
    same = [replace(s, teacher_prompt_ids=s.student_prompt_ids) for s in samples()]
    scores = policy.evaluate_loss(same, LOSS, teach_itself=True)
    floor = sum(s.loss_sum for s in scores) / sum(s.num_tokens for s in scores)
    first = policy.update(samples(), LOSS, lr=1e-3)
    for _ in range(4):
        last = policy.update(samples(), LOSS, lr=1e-3)
    before, after = (sum(s.loss_sum for s in report.scores) for report in (first, last))
    assert after < before
    assert floor < before / sum(s.num_tokens for s in first.scores)


@pytest.mark.parametrize("implementation", ["local", pytest.param("transformer_engine", marks=with_engine)])
def test_sampler_and_trainer_agree(folder, ranks, implementation):
    policy = make_policy(folder, ranks, transformer_impl=implementation)
    sampling = SamplingParameters(max_new_tokens=32, temperature=1.1, top_p=0.95, top_k=20, stop_ids=frozenset({0}))
    requests = [
        GenerationRequest(problem_id=s.problem.id, sample_index=0, prompt_ids=s.student_prompt_ids, key=s.key)
        for s in samples()
    ]
    rollouts = policy.sampler.generate(requests, sampling)
    scored = [replace(s, rollout=r) for s, r in zip(samples(), rollouts, strict=True)]
    assert max(score.sampler_gap.largest for score in policy.evaluate_loss(scored, LOSS)) < 0.3


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=8, alpha=16)], ids=["full", "lora"])
@pytest.mark.parametrize("implementation", ["local", pytest.param("transformer_engine", marks=with_engine)])
def test_captured_decoding_samples_the_tokens_of_eager_decoding(folder, ranks, implementation, lora):
    """Greedy, with buckets that end at the same positions in both: the same kernels on the same shapes."""
    policy = make_policy(folder, ranks, lora=lora, transformer_impl=implementation)
    fill_adapters(policy)
    sampling = SamplingParameters(max_new_tokens=40, temperature=0.0, top_p=1.0, top_k=0, stop_ids=frozenset({0}))
    requests = [
        GenerationRequest(problem_id=s.problem.id, sample_index=0, prompt_ids=s.student_prompt_ids, key=s.key)
        for s in samples()
    ]
    policy.sampler.bucket = 16
    found = []
    for capture in (EagerCapture, CudaCapture):
        policy.sampler.capture = capture
        found.append(policy.sampler.generate(requests, sampling))
    assert [r.response_ids for r in found[0]] == [r.response_ids for r in found[1]]
    for one, other in zip(*found, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@with_engine
def test_a_precision_aware_optimiser_takes_the_usual_steps_and_resumes(folder, ranks, moments, tmp_path):
    """With float32 moments the weights agree to bfloat16's rounding; a resumed run takes the same step to the bit."""
    usual = make_policy(folder, ranks)
    types = {"exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    aware = make_policy(folder, ranks, use_precision_aware_optimizer=True, **types)
    for _ in range(3):
        for policy in (usual, aware):
            policy.update(samples(), LOSS, lr=1e-3)
    pairs = zip(usual.stage.parameters(), aware.stage.parameters(), strict=True)
    assert all((one - other).norm() < 0.02 * one.norm() for one, other in pairs)
    resumes_to_the_bit(aware, make_policy(folder, ranks, use_precision_aware_optimizer=True, **types), tmp_path)


@pytest.mark.parametrize("overlap", [False, True])
@with_engine
def test_an_optimiser_in_host_memory_takes_the_usual_steps_and_resumes(folder, ranks, overlap, tmp_path):
    moved = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    moved |= {"overlap_cpu_optimizer_d2h_h2d": overlap}
    usual, host = make_policy(folder, ranks), make_policy(folder, ranks, **moved)
    for _ in range(3):
        for policy in (usual, host):
            policy.update(samples(), LOSS, lr=1e-3)
    pairs = zip(usual.stage.parameters(), host.stage.parameters(), strict=True)
    assert all((one - other).norm() < 0.02 * one.norm() for one, other in pairs)
    state = next(iter(host.optimizer.chained_optimizers[0].optimizer.state.values()))
    assert {state[name].device.type for name in ("exp_avg", "exp_avg_sq", "master_param")} == {"cpu"}
    resumes_to_the_bit(host, make_policy(folder, ranks, **moved), tmp_path)


def resumes_to_the_bit(policy, other, folder):
    """Asserts that another policy, which loads this one's checkpoint, takes the same step on the same gradient."""
    from megatron_paint.mcore.optimizer import take_step

    policy.save(folder / "saved", {"step": 3})
    policy.finish_save(wait=True)
    assert other.load(folder / "saved")["step"] == 3
    before = [p.clone() for p in policy.stage.parameters()]
    policy.backward(samples(), LOSS, policy.teacher_states(samples(), LOSS))
    for one, same in zip(policy.stage.parameters(), other.stage.parameters(), strict=True):
        same.main_grad.copy_(one.main_grad)  # a backward pass on a GPU may add up in another order each time
    for each in (policy, other):
        take_step(each.optimizer, lr=1e-3, weight_decay=0.0)
    assert all(map(torch.equal, policy.stage.parameters(), other.stage.parameters()))
    assert not all(map(torch.equal, policy.stage.parameters(), before))


@with_engine
def test_gradients_with_offloaded_activations(folder, ranks):
    """One of two layers; the tensors are as large as Transformer Engine asks for, 256 Ki numbers."""
    found = []
    for megatron in ({}, {"cpu_offloading": True, "cpu_offloading_num_layers": 1}):
        policy = make_policy(folder, ranks, **megatron)
        policy.teacher_states(samples(24), LOSS)  # passes without gradients leave the offloading in order
        policy.backward(samples(24), LOSS, policy.teacher_states(samples(24), LOSS))
        found.append([p.main_grad.clone() for p in policy.stage.parameters()])
    assert all((one - other).norm() < 1e-2 * one.norm() for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.95, 0), (0.95, 20)])
def test_a_gpu_draws_the_tokens_of_a_cpu_and_nothing_waits_for_it(top_p, top_k):
    sampling = SamplingParameters(
        max_new_tokens=3, temperature=1.1, top_p=top_p, top_k=top_k, stop_ids=frozenset({5, 6})
    )
    requests = [GenerationRequest(problem_id=str(i), sample_index=0, prompt_ids=(1,), key=i) for i in range(16)]
    steps = [normal(16, 20_000, spread=5.0, seed=step) for step in range(3)]
    rollouts = {}
    for device in (torch.device("cpu"), torch.device("cuda")):
        rows, logits = DecodedRows(requests, sampling, device), [step.to(device, copy=True) for step in steps]
        torch.cuda.set_sync_debug_mode("error")
        for logits_RV in logits:
            token_R, logp_R = choose_tokens(logits_RV, uniform_R=rows.uniform, sampling=sampling)
            rows.add(token_R, logp_R.double())
        torch.cuda.set_sync_debug_mode("default")
        rollouts[device.type] = [(rollout.response_ids, rollout.finished) for rollout in rows.rollouts()]
    assert rollouts["cuda"] == rollouts["cpu"]


LOSSES = options(clip=0.05) | {"full-teacher": {"partner": "full_teacher", "clip": 0.05}}


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_fused_loss_equals_float64(name, dtype, kernel):
    """The fused loss on CUDA against the float64 reference on the same numbers; 4,099 columns fill no block.

    The hidden gradient comes back in the inputs' type; bfloat16 rounds the logits' gradient too, before its products.
    """
    generator = torch.Generator().manual_seed(2)
    student, teacher, full = (torch.randn(96, 64, generator=generator).to(dtype) for _ in range(3))
    weight = (torch.randn(4099, 64, generator=generator) / 8).to(dtype)
    config, lengths = InterpolationLossConfig(weight=0.3, fraction=0.25, **LOSSES[name]), (50, 46)
    has_full = config.partner == "full_teacher"
    h64, w64 = student.double().requires_grad_(), weight.double().requires_grad_()
    wanted = interpolation_loss(
        h64 @ w64.t(),
        teacher.double() @ weight.double().t(),
        lengths=lengths,
        config=config,
        full_teacher_logits_TV=full.double() @ weight.double().t() if has_full else None,
    )
    wanted.loss_T.sum().backward()
    h, w = student.cuda().requires_grad_(), torch.nn.Parameter(weight.cuda())
    w.main_grad, w.grad_added_to_main_grad = torch.zeros(w.shape, device="cuda"), False
    found = fused_interpolation_loss(
        h,
        w,
        teacher.cuda(),
        lengths=lengths,
        config=config,
        vocab=WholeVocab(),
        chunk_tokens=48,
        full_teacher_hidden_TH=full.cuda() if has_full else None,
        kernel=kernel,
    )
    found.loss_T.sum().backward()
    assert w.grad_added_to_main_grad
    assert torch.equal(found.selected_T.cpu(), wanted.selected_T)
    torch.testing.assert_close(found.loss_T.double().cpu(), wanted.loss_T, rtol=2e-5, atol=1e-6)
    tolerance = 5e-6 if dtype == torch.float32 else 5e-3
    for ours, theirs in ((h.grad, h64.grad), (w.main_grad, w64.grad)):
        assert (ours.double().cpu() - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_token_logprobs_equal_float64(weighted, dtype, kernel):
    """Log-probabilities, entropies and gradients on CUDA against float64's on the same numbers."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(96, 64, generator=generator).to(dtype)
    weight = (torch.randn(4099, 64, generator=generator) / 8).to(dtype)
    ids = torch.randint(4099, (96,), generator=generator)
    factor = torch.linspace(-1.0, 2.0, 96)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(h64 @ w64.t() / 1.1, 1)
    wanted = logp.gather(1, ids[:, None]).squeeze(1)
    (wanted * factor.double()).sum().backward()
    h, w = hidden.cuda().requires_grad_(), torch.nn.Parameter(weight.cuda())
    w.main_grad, w.grad_added_to_main_grad = torch.zeros(w.shape, device="cuda"), False
    found = token_logprobs(
        h,
        w,
        ids.cuda(),
        vocab=WholeVocab(),
        temperature=1.1,
        chunk_tokens=48,
        token_weight_T=factor.cuda() if weighted else None,
        kernel=kernel,
    )
    (found.logp_T if weighted else found.logp_T * factor.cuda()).sum().backward()
    values = found.logp_T.detach().double().cpu() / (factor.double() if weighted else 1.0)
    torch.testing.assert_close(values, wanted.detach(), rtol=2e-5, atol=1e-6)
    entropy = -(logp.exp() * logp).sum(1).detach()
    torch.testing.assert_close(found.entropy_T.double().cpu(), entropy, rtol=2e-5, atol=1e-6)
    tolerance = 5e-6 if dtype == torch.float32 else 5e-3
    for ours, theirs in ((h.grad, h64.grad), (w.main_grad, w64.grad)):
        assert (ours.double().cpu() - theirs).norm() / theirs.norm() < tolerance


def test_kernels_agree_on_hard_logits():
    """Triton and torch on logits of 1e4, on a teacher that is the student, and on one row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1001, 32, generator=generator).cuda()
    for scale, teacher_scale, tokens in ((600.0, -600.0, 20), (1.0, 1.0, 20), (1.0, 2.0, 1)):
        hidden = torch.randn(tokens, 32, generator=generator).cuda()
        settings = {"lengths": [tokens], "config": InterpolationLossConfig(clip=0.05), "vocab": WholeVocab()}
        losses = []
        for kernel in ("torch", "triton"):
            h = (hidden * scale).requires_grad_()
            output = fused_interpolation_loss(h, weight, hidden * teacher_scale, kernel=kernel, **settings)
            output.loss_T.sum().backward()
            assert torch.isfinite(h.grad).all()
            losses.append(output.loss_T)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        if scale == teacher_scale:
            assert losses[1].abs().max() == 0.0
