"""How replicas share the optimiser's state and new weights: what is accepted, and each refusal with its fix."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of

SMALLEST = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r"}}
SFT = {"objective": {"name": "sft"}}
OVERLAP = {"overlap_param_gather": True, "overlap_grad_reduce": True}
WHOLE = {"use_distributed_optimizer": False}


def settings(megatron, sections):
    return settings_of(SMALLEST | {"megatron": megatron} | sections)


@pytest.mark.parametrize(
    ("given", "sections"),
    [
        (OVERLAP, SFT),
        (OVERLAP | {"num_distributed_optimizer_instances": 2}, SFT),
        ({"num_distributed_optimizer_instances": 4}, {}),
    ],
)
def test_accepted(given, sections):
    found = settings(given, sections).megatron
    assert {name: getattr(found, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "sections", "told"),
    [
        (
            WHOLE | {"num_distributed_optimizer_instances": 2},
            SFT,
            "megatron.num_distributed_optimizer_instances=2 divides the replicas that share the optimiser's state, and "
            "with megatron.use_distributed_optimizer=false none do: leave one of them out",
        ),
        (
            OVERLAP | WHOLE,
            SFT,
            "megatron.overlap_param_gather needs megatron.use_distributed_optimizer=true: set it, or leave "
            "overlap_param_gather out",
        ),
        (
            {"overlap_param_gather": True},
            SFT,
            "megatron.overlap_param_gather needs megatron.overlap_grad_reduce=true: set it, or leave "
            "overlap_param_gather out",
        ),
        (
            OVERLAP,
            {"objective": {"name": "grpo"}},
            "megatron.overlap_param_gather=true gathers weights during the next pass of training, and "
            "objective.name=grpo reads them before it, to sample or to score: leave it out",
        ),
        (
            OVERLAP,
            SFT | {"model": {"hf_path": "m", "lora": {}}},
            "megatron.overlap_param_gather=true gathers the trained weights while layers compute, and with model.lora "
            "these are small adapters: leave it out",
        ),
    ],
)
def test_refused(given, sections, told):
    with pytest.raises(UserError) as error:
        settings(given, sections)
    assert str(error.value).endswith(told)
