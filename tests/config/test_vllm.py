"""Settings of the engine vllm that contradict each other."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.load import settings_of
from megatron_paint.config.saved import changes, forbidden_changes
from megatron_paint.config.tree import settings_tree

URLS = ["http://a:1", "http://b:1"]
LORA = {"rank": 8, "alpha": 16.0}
IPC = {"transfer": "ipc", "servers": 2, "devices": ["0", "1"]}


def settings(rollout=None, model=None, objective=None, data=None, run=None):
    return settings_of(
        {
            "model": {"hf_path": "m", **(model or {})},
            "data": {"train": "p.jsonl", **(data or {})},
            "run": {"dir": "r", **(run or {})},
            "rollout": rollout or {},
            "objective": objective or {},
        }
    )


def test_one_step_ahead_of_what():
    """Objectives without rollouts, orders that follow verdicts, and the weights of another objective."""
    ahead = {"engine": "vllm", "ahead": 1}
    assert settings(ahead).rollout.importance_limit == 2.0
    assert settings(ahead | {"temperature": 0.0, "importance_limit": None}).rollout.ahead == 1
    for rollout, more, message in (
        (ahead, {"objective": {"name": "sft"}}, "and objective.name=sft samples no responses"),
        (ahead, {"data": {"order": "adastar"}}, "data.order=adastar chooses them by these verdicts"),
        (
            ahead | {"importance_limit": 3.0},
            {"objective": {"name": "grpo", "grpo": {"importance_limit": None}}},
            "and grpo has its clipped ratio",
        ),
    ):
        with pytest.raises(UserError) as told:
            settings(rollout, **more)
        assert message in str(told.value)


@pytest.mark.parametrize(
    ("rollout", "model", "message"),
    [
        ({"vllm": {"servers": 2}}, {}, "the section rollout.vllm belongs to engine=vllm"),
        (
            {"engine": "vllm", "vllm": {"urls": URLS, "devices": ["1"]}},
            {},
            "rollout.vllm.devices is about servers that",
        ),
        ({"engine": "vllm", "vllm": {"urls": ["node:1"]}}, {}, "holds 'node:1'; an address has http://"),
        ({"engine": "vllm", "vllm": {"urls": ["http://"]}}, {}, "holds 'http://'; an address has http://"),
        ({"engine": "vllm", "vllm": {"urls": ["http://[::1"]}}, {}, "holds 'http://[::1' (Invalid IPv6 URL); an"),
        ({"engine": "vllm", "vllm": {"urls": ["http://a:80000"]}}, {}, "holds 'http://a:80000' (Port out of range"),
        ({"engine": "vllm", "vllm": {"urls": ["http://a:8000/v1"]}}, {}, "holds 'http://a:8000/v1'; an address has"),
        ({"engine": "vllm", "vllm": {"urls": URLS[:1] * 2}}, {}, "names a server twice"),
        (
            {"engine": "vllm", "vllm": {"urls": ["http://a:8000", "http://A:8000/"]}},
            {},
            "names a server twice, as http://a:8000 and http://A:8000/",
        ),
        ({"engine": "vllm", "vllm": {"servers": 2, "devices": ["1"]}}, {}, "has 1 entry for rollout.vllm.servers=2"),
        (
            {"engine": "vllm", "vllm": {"devices": ["6"], "tensor_parallel": 2}},
            {},
            "gives a server the GPUs '6', and rollout.vllm.tensor_parallel=2 needs 2",
        ),
        (
            {"engine": "vllm", "vllm": {"servers": 2, "devices": ["6", "6"]}},
            {},
            "rollout.vllm.devices names GPU 6 twice",
        ),
        (
            {"engine": "vllm", "max_new_tokens": 40, "vllm": {"max_model_len": 40}},
            {},
            "rollout.vllm.max_model_len=40 leaves no room for a prompt beside rollout.max_new_tokens=40",
        ),
        ({"engine": "vllm", "temperature": 0.005}, {}, "rollout.temperature=0.005 is below 0.01"),
        ({"lora_transfer": "adapter"}, {"lora": LORA}, "rollout.lora_transfer belongs to engine=vllm"),
        ({"engine": "vllm", "lora_transfer": "adapter"}, {}, "the adapters of model.lora, which is not set"),
        (
            {"engine": "vllm", "lora_transfer": "adapter"},
            {"lora": LORA, "megatron_path": "c"},
            "from model.hf_path and not from model.megatron_path",
        ),
        ({"ahead": 1}, {}, "samples while a step trains, which needs servers, and rollout.engine=megatron"),
        ({"importance_limit": 3.0}, {}, "rollout.importance_limit=3.0 belongs to rollout.ahead=1"),
        ({"engine": "vllm", "ahead": 1, "importance_limit": 0.5}, {}, "rollout.importance_limit"),
        ({"engine": "vllm", "ahead": 2}, {}, "rollout.ahead"),
        ({"engine": "vllm", "ahead": 1, "temperature": 0.0}, {}, "rollout.temperature=0 samples without probabilities"),
        ({"engine": "vllm", "vllm": {"server": 2}}, {}, "rollout.vllm.server"),
        ({"engine": "vllm", "vllm": {"transfer": "gloo"}}, {}, "rollout.vllm.transfer"),
        (
            {"engine": "vllm", "lora_transfer": "adapter", "vllm": {"transfer": "nccl"}},
            {"lora": LORA},
            "set lora_transfer to merged or transfer to file",
        ),
        (
            {"engine": "vllm", "vllm": {"transfer": "nccl", "transfer_folder": "/shared"}},
            {},
            "rollout.vllm.transfer=nccl writes no files",
        ),
        (
            {"engine": "vllm", "vllm": {"transfer": "ipc", "urls": URLS}},
            {},
            "rollout.vllm.transfer=ipc shares the GPUs of the ranks with servers that the run starts",
        ),
        ({"engine": "vllm", "vllm": {"transfer": "ipc"}}, {}, "rollout.vllm.devices is not set"),
        (
            {"engine": "vllm", "ahead": 1, "vllm": {"transfer": "ipc", "devices": ["0"]}},
            {},
            "rollout.ahead=1 samples at that time",
        ),
        ({"engine": "vllm", "vllm": {"servers": 0}}, {}, "rollout.vllm.servers"),
    ],
)
def test_mistakes(rollout, model, message):
    with pytest.raises(UserError) as told:
        settings(rollout, model)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("sampling", "known"),
    [
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 5}, True),
        ({"temperature": 0.7, "top_p": 1.0, "top_k": 0}, True),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 0}, False),
        ({"temperature": 0.7, "top_p": 1.0, "top_k": 5}, False),
    ],
)
def test_grpo_needs_log_probabilities_where_vllm_has_them(sampling, known):
    rollout = {"engine": "vllm", **sampling}
    assert settings(rollout).rollout.vllm_has_logprobs == known
    objective = {"name": "grpo", "grpo": {"importance_limit": 2.0}}
    if known:
        settings(rollout, objective=objective)
        return
    with pytest.raises(UserError, match=r"objective\.grpo\.importance_limit=2\.0 needs log-probabilities"):
        settings(rollout, objective=objective)
    settings(rollout, objective={"name": "grpo", "grpo": {"importance_limit": None}})


def test_where_the_servers_are_may_change():
    old, new = settings({"engine": "vllm"}), settings({"engine": "vllm", "transfer_bytes": 1e6, "vllm": {"urls": URLS}})
    assert not changes(
        old=settings_tree(old), new=settings_tree(settings({"engine": "vllm", "vllm": {"environment": {"A": "b"}}}))
    )
    assert not changes(old=settings_tree(old), new=settings_tree(new))
    assert changes(old=settings_tree(old), new=settings_tree(settings())) == {"rollout.engine": ("vllm", "megatron")}


@pytest.mark.parametrize("vllm", [{"transfer": "nccl"}, {"transfer": "nccl", "urls": URLS}, IPC])
def test_transfers_between_gpus_need_no_gpu_to_be_valid(vllm):
    """A run is refused when it starts; a resumed run may change the transfer."""
    new = settings({"engine": "vllm", "vllm": vllm})
    assert new.rollout.vllm.transfer == vllm["transfer"]
    assert settings({"engine": "vllm"}).rollout.vllm.transfer == "file"
    assert not forbidden_changes(old=settings_tree(settings({"engine": "vllm"})), new=settings_tree(new))


def test_a_server_counts_as_hung_before_the_run_does():
    limits = {"hang_timeout_s": 120.0}
    settings({"engine": "vllm", "vllm": limits}, run=limits)
    settings({}, run=limits)  # no servers
    with pytest.raises(UserError, match=r"^run.hang_timeout_s=120 is below rollout.vllm.hang_timeout_s=300, so"):
        settings({"engine": "vllm"}, run=limits)
