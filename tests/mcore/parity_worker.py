"""Runs parity cases at one layout: those that touch it, or the rest. Rank 0 writes what came out."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_paint.checkpoints.stacked_adapters import packed, stacked_key, unpacked
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.objective import GrpoSettings, ObjectiveSettings, TeacherSettings
from megatron_paint.config.settings import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    RolloutSettings,
    RunSettings,
    Settings,
)
from megatron_paint.losses import InterpolationLossConfig
from megatron_paint.losses.objectives import CrossEntropyLoss, DistillationLoss
from megatron_paint.mcore import hf_checkpoint, optimizer
from megatron_paint.mcore.hf_checkpoint import gathered_tensors, load_stage
from megatron_paint.mcore.lora import adapters_of, named_expert_adapters
from megatron_paint.mcore.policy import MegatronPolicy
from megatron_paint.mcore.ranks import start_ranks, stop_ranks
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.objectives import Grpo, ObjectiveInputs
from megatron_paint.policy import ScoredSequence
from megatron_paint.records import Problem, Rollout, Sample
from megatron_paint.rollouts.source import RolloutSource
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import LAYOUTS, layout_of

RANK, ALPHA = 4, 8


def settings_of(case: parity.Case, folder: Path, megatron: dict) -> Settings:
    return Settings(
        model=ModelSettings(
            hf_path=str(case.checkpoint(folder, "start")),
            dtype="float32",
            lora=LoraSettings(rank=RANK, alpha=ALPHA, experts=case.adapts_experts) if case.lora else None,
        ),
        data=DataSettings(train="unused", micro_batch_tokens=40),
        run=RunSettings(dir="unused"),
        rollout=RolloutSettings(temperature=parity.GRPO_TEMPERATURE),
        objective=ObjectiveSettings(
            name="paint" if case.grpo is None else "grpo",
            loss=InterpolationLossConfig(**case.loss_settings),
            grpo=GrpoSettings(**(case.grpo or {})),
            chunk_bytes=4e3,
            teacher=TeacherSettings(
                weights=case.teacher if case.teacher != "none" else "current",
                ema_decay=parity.EMA_DECAY,
                ema_anchor=case.ema_anchor,
                offload=case.offload,
            ),
        ),
        optimizer=OptimizerSettings(
            name=case.optimizer,
            lr=case.lr,
            eps=case.eps,
            clip_grad=case.clip_grad,
            weight_decay=case.weight_decay,
        ),
        megatron=MegatronSettings(
            **megatron,
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_grad_reduce=case.overlap_grad_reduce,
            overlap_param_gather=case.overlap_param_gather,
        ),
    )


def records(step: int, case: parity.Case) -> list[Sample]:
    if case.grpo is not None:
        return grpo_records(step, case)
    return [
        Sample(
            problem=Problem(id=str(i), problem="", solution="", answer=""),
            key=i,
            rollout=Rollout(problem_id=str(i), prompt_ids=tuple(student), response_ids=tuple(response)),
            teacher_prompt_ids=tuple(teacher) if case.teacher != "none" else None,
            full_teacher_prompt_ids=tuple(full) if case.loss_settings.get("partner") == "full_teacher" else None,
            old_logprobs=case.older(i, len(response)),
        )
        for i, (student, teacher, full, response) in enumerate(parity.step_samples(step)[: case.num_samples])
    ]


def grpo_records(step: int, case: parity.Case) -> list[Sample]:
    """Rollouts with advantages that are given, and the weights that `Grpo.samples` would give them."""
    rows = parity.step_samples(step)[: case.num_samples]
    tokens = sum(len(response) for *_, response in rows)
    return [
        Sample(
            problem=Problem(id=str(i), problem="", solution="", answer=""),
            key=i,
            teacher_prompt_ids=tuple(student) if case.grpo.get("kl_weight") else None,
            rollout=Rollout(
                problem_id=str(i),
                sample_index=0,
                prompt_ids=tuple(student),
                response_ids=tuple(response),
                logprobs=parity.sampler_logprobs(i, len(response)),
                finished=True,
            ),
            advantage=parity.ADVANTAGES[i],
            old_logprobs=case.older(i, len(response)),
            weight=tokens / (len(rows) * len(response)) if case.grpo.get("normalisation") == "sequence_mean" else 1.0,
        )
        for i, (student, _, _, response) in enumerate(rows)
    ]


def adapters_by_peft_name(policy: MegatronPolicy) -> dict[str, torch.nn.Parameter]:
    found = {}
    for name, p in policy.stage.named_parameters():
        if "_adapters." not in name or "expert_adapters." in name:
            continue
        *_, layer, block, _, side, projection = name.split(".")
        hf_block = {"self_attention": "self_attn", "mlp": "mlp"}[block]
        found[f"model.layers.{layer}.{hf_block}.{projection}.lora_{side.upper()}"] = p
    return found


def set_adapters(policy: MegatronPolicy) -> None:
    for name, p in adapters_by_peft_name(policy).items():
        shape = list(p.shape)
        if p.tensor_model_parallel:
            shape[p.partition_dim] *= policy.ranks.tp_size
        whole = parity.adapter_value(name, torch.Size(shape))
        if p.tensor_model_parallel:
            whole = whole.chunk(policy.ranks.tp_size, dim=p.partition_dim)[policy.ranks.tp_rank]
        p.data.copy_(whole)
    for layer, stacked, side, p in named_expert_adapters(policy.stage):
        name = short_key(layer, stacked, side)
        experts = policy.shape.num_experts
        like = packed(side, torch.empty(experts, *p.shape[1:]))
        value = unpacked(side, parity.adapter_value(name, like.shape), experts)
        p.data.copy_(value.chunk(policy.ranks.ep_size)[policy.ranks.ep_rank])


def short_key(layer: int, stacked: str, side: str) -> str:
    return stacked_key(layer, stacked, side).removeprefix("base_model.model.").removesuffix(".weight")


def everyones(policy: MegatronPolicy, mine: dict) -> dict:
    gathered = [None] * policy.ranks.size
    dist.all_gather_object(gathered, mine, group=policy.ranks.host_group)
    return {k: v for part in gathered for k, v in part.items()}


def gradients(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """Whole gradients by their Hugging Face or PEFT name."""
    ranks, stage = policy.ranks, policy.stage
    named = [(n, p.main_grad.clone()) for n, p in stage.named_parameters() if p.requires_grad and "_adapters." not in n]
    mine = dict(gathered_tensors(named, policy.shape, ranks))
    for name, p in adapters_by_peft_name(policy).items():
        parts = [p.main_grad.clone()]
        if p.tensor_model_parallel and ranks.tp_size > 1:
            parts = [torch.empty_like(parts[0]) for _ in range(ranks.tp_size)]
            dist.all_gather(parts, p.main_grad.contiguous(), group=ranks.tp_group)
        mine[name] = torch.cat(parts, dim=max(p.partition_dim, 0)) if p.tensor_model_parallel else parts[0]
    return everyones(policy, mine) | expert_adapter_gradients(policy)


def expert_adapter_gradients(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """Those of the adapters of all experts, by PEFT's names."""
    mine = {
        (layer, stacked, side, policy.ranks.ep_rank): p.main_grad.clone()
        for layer, stacked, side, p in named_expert_adapters(policy.stage)
    }
    found = everyones(policy, mine)
    whole = {key[:3]: [] for key in found}
    for key in sorted(found):
        whole[key[:3]].append(found[key])
    return {short_key(*key): packed(key[2], torch.cat(parts)) for key, parts in whole.items()}


def teacher_hidden(policy: MegatronPolicy, samples: list[Sample]) -> dict[int, torch.Tensor]:
    """Hidden states [N, H] that the teacher pass keeps, by sample."""
    loss = DistillationLoss(config=InterpolationLossConfig(), chunk_bytes=4e3, token_temperature=1.1)
    kept = policy.teacher_states(samples, loss).hidden_NH
    assert policy.ranks.is_last_stage or not kept
    return everyones(policy, kept)


def accumulate(policy: MegatronPolicy, samples: list[Sample], loss) -> None:
    """Leaves the gradient of one step in Megatron's buffers."""
    policy.backward(samples, loss, policy.teacher_states(samples, loss))


def run_case(case: parity.Case, folder: Path, out: Path, ranks, megatron: dict) -> None:
    settings = settings_of(case, folder, megatron)
    shape = read_shape(settings.model.hf_path)
    with pytest.MonkeyPatch.context() as patch:
        if case.bucket_size is not None:
            sized = partial(optimizer.DistributedDataParallelConfig, bucket_size=case.bucket_size)
            patch.setattr(optimizer, "DistributedDataParallelConfig", sized)
        policy = MegatronPolicy(settings, shape, ranks)
    load_stage(policy.stage, case.checkpoint(folder, "moved"), shape, ranks)
    set_adapters(policy)
    policy.optimizer.reload_model_params()
    if not case.lora:
        policy.teacher.follow()
    loss = CrossEntropyLoss(chunk_bytes=1e9)
    if case.overlap_param_gather:
        loss = AfterTheGather(policy)
    if case.grpo is not None:
        prompts = SimpleNamespace(tokenizer=SimpleNamespace(stop_ids=(0,)))
        source = RolloutSource(policy.sampler, prompts, settings.rollout, samples=2, seed=settings.run.seed)
        objective = Grpo(ObjectiveInputs(settings=settings.objective, prompts=prompts, rollouts=source))
        loss = objective.loss
    elif case.teacher != "none":
        config = InterpolationLossConfig(**case.loss_settings)
        loss = DistillationLoss(
            config=config, chunk_bytes=4e3, token_temperature=1.1, importance_limit=case.importance_limit
        )
    result = {"losses": [], "gradients": [], "norms": [], "hidden": {}, "clipped": [], "logprobs": {}, "metrics": []}
    if case.has_teacher_prompt:
        result["hidden"] = teacher_hidden(policy, records(0, case))
        sequences = [
            ScoredSequence(prompt_ids=s.teacher_prompt_ids, response_ids=s.response_ids) for s in records(0, case)
        ]
        for weights in ("teacher", "current"):
            result["logprobs"][weights] = policy.logprobs(sequences, weights=weights)
    for step in range(parity.STEPS):
        samples = records(step, case)
        if not case.distributed_optimizer:
            accumulate(policy, samples, loss)
            result["gradients"].append(gradients(policy))
        reports = [policy.update(samples, loss, lr=case.lr)] if case.grpo is None else None
        for report in reports or objective.update(policy, samples, lr=case.lr)[0]:
            result["losses"].append([score.loss_sum for score in report.scores])
            result["norms"].append(report.grad_norm)
            result["metrics"].append(report.metrics)
            result["clipped"].append(sum(score.sums.get("clipped_ratios", 0.0) for score in report.scores))
        if case.overlap_param_gather:
            assert not any(group.param_gather_dispatched for group in bucket_groups(policy))
    policy.export(out / case.name)
    if ranks.rank == 0:
        torch.save(result, out / f"{case.name}.pt")
    assert bool(adapters_of(policy.stage)) == case.lora


class AfterTheGather(CrossEntropyLoss):
    """Cross entropy that fails if weights are still on their way, such as those of the output layer, which it reads."""

    def __init__(self, policy: MegatronPolicy):
        super().__init__(chunk_bytes=1e9)
        self.policy = policy

    def __call__(self, rows):
        groups = bucket_groups(self.policy)
        if self.policy.ranks.pp_size == 1:  # Megatron makes one group of all weights of a later stage
            assert len(groups) > len(self.policy.wrapped)
        assert all(group.param_gather_dispatched and group.param_gather_handle is None for group in groups)
        return super().__call__(rows)


def bucket_groups(policy: MegatronPolicy) -> list:
    return [group for chunk in policy.wrapped for group in chunk.bucket_groups]


class InfiniteGradient(DistillationLoss):
    """The loss with its value and a gradient that is not finite."""

    def __call__(self, rows):
        output = super().__call__(rows)
        if output.loss_T.requires_grad:
            output.loss_T.register_hook(lambda gradient: gradient * torch.inf)
        return output


class NoNumber(DistillationLoss):
    """The loss, which is no number for one sample of the step."""

    def __call__(self, rows):
        output = super().__call__(rows)
        parts = zip(rows.samples, output.loss_T.split(rows.lengths), strict=True)
        losses = [part * torch.nan if sample.problem.id == "2" else part for sample, part in parts]
        return dataclasses.replace(output, loss_T=torch.cat(losses)) if losses else output


def state_of(policy: MegatronPolicy) -> list[torch.Tensor]:
    """This rank's weights, the optimiser's own, its state, and the teacher's weights."""
    inner = [part.optimizer for part in policy.optimizer.chained_optimizers]
    own = [p for optimizer in inner for group in optimizer.param_groups for p in group["params"]]
    moments = [value for optimizer in inner for state in optimizer.state.values() for value in state.values()]
    found = [*policy.stage.parameters(), *own, *moments, *policy.teacher.held.values()]
    return [tensor.detach().clone() for tensor in found if isinstance(tensor, torch.Tensor)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def run_not_finite(name: str, folder: Path, ranks, megatron: dict) -> list[dict]:
    """What each rank is told, and whether anything stays of it, where a loss or only the gradient is not finite."""
    (case,) = (case for case in parity.CASES if case.name == name)
    settings = settings_of(case, folder, megatron)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=parity.NOT_FINITE[name]))
    policy, unharmed = (MegatronPolicy(settings, read_shape(settings.model.hf_path), ranks) for _ in range(2))
    config = InterpolationLossConfig(**parity.LOSS)

    def update(policy: MegatronPolicy, kind: type[DistillationLoss], step: int) -> None:
        policy.update(records(step, case), kind(config=config, chunk_bytes=4e3, token_temperature=1.1), lr=case.lr)

    found = {"told": [], "stays": []}
    states = []
    for step, kind in enumerate((NoNumber, InfiniteGradient)):
        before = state_of(policy)
        try:
            update(policy, kind, step)
        except FloatingPointError as error:
            found["told"].append(str(error))
        found["stays"].append(same(before, state_of(policy)))
        for one in (policy, unharmed):
            update(one, DistillationLoss, step)
        states.append(state_of(policy))
    found["continues"] = same(states[-1], state_of(unharmed))
    found["moves"] = not same(*states)
    everyone = [None] * ranks.size
    dist.all_gather_object(everyone, found, group=ranks.host_group)
    return everyone


def main() -> None:
    name, folder, out, part = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    layout = layout_of(name)
    torch.set_num_threads(1)
    hf_checkpoint.WRITER_BYTES = 10_000  # the ranks share the writing even of these models
    ranks = start_ranks(MegatronSettings(**layout.megatron))
    for case in parity.cases_at(name):
        if parity.part_of(name, case.name) == part:
            run_case(case, folder, out, ranks, layout.megatron)
    told = {
        case: run_not_finite(case, folder, ranks, layout.megatron)
        for case in parity.NOT_FINITE
        if name in LAYOUTS and parity.part_of(name, case) == part
    }
    if ranks.rank == 0:
        torch.save(told, out / "not_finite.pt")
    stop_ranks()


if __name__ == "__main__":
    main()
