"""What is asked of a server, what its answers must hold, and which server gets which prompts; no server runs."""

import asyncio
import dataclasses
import itertools
import json

import httpx
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.vllm import VllmSettings
from megatron_paint.records import WeightSpan
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.balance import balanced
from megatron_paint.rollouts.vllm.client import Client, ServerError, check_requests
from megatron_paint.rollouts.vllm.command import ServerOptions, server_command, server_environment
from megatron_paint.rollouts.vllm.logprobs_check import mode_from

REQUEST = GenerationRequest(problem_id="p", sample_index=2, prompt_ids=(5, 6), key=2**62 + 1)
SAMPLING = SamplingParameters(max_new_tokens=3, temperature=1.1, top_p=0.95, top_k=20, stop_ids=frozenset({9, 4}))
SPAN = {"version": "v", "start": 0, "end": 3}
CONTENT = [{"token_id": token, "logprob": -token / 4, "rank": 1} for token in (1, 2, 9)]
CHOICE = {
    "token_ids": [1, 2, 9],
    "finish_reason": "stop",
    "logprobs": {"content": CONTENT},
    "weight_versions": [SPAN],
}


def asked(answer, *, status=200, version="v", wants_logprobs=True, timeout=5.0):
    """What the client makes of an answer, and the body that it sent."""
    bodies = []

    def respond(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(status, json=answer)

    async def ask():
        client = Client("http://server:1/", timeout=timeout)
        client._http = httpx.AsyncClient(base_url=client.url, transport=httpx.MockTransport(respond))
        return await client.generate(REQUEST, SAMPLING, version=version, wants_logprobs=wants_logprobs)

    return asyncio.run(ask()), bodies[0]


def test_a_rollout():
    rollout, body = asked({"choices": [CHOICE]})
    assert (rollout.problem_id, rollout.sample_index, rollout.prompt_ids) == ("p", 2, (5, 6))
    assert rollout.response_ids == (1, 2, 9)
    assert rollout.finished
    assert rollout.logprobs == (-0.25, -0.5, -2.25)
    assert rollout.origin.server == "http://server:1"
    assert rollout.origin.weights == (WeightSpan(version="v", start=0, end=3),)
    parameters = body["sampling_params"]
    assert body["token_ids"] == [5, 6]
    assert (parameters["seed"], parameters["stop_token_ids"], parameters["max_tokens"]) == (2**62 + 1, [4, 9], 3)
    assert (parameters["temperature"], parameters["top_p"], parameters["top_k"]) == (1.1, 0.95, 20)
    assert parameters["ignore_eos"]
    assert parameters["repetition_penalty"] == 1.0


def test_a_rollout_that_was_cut():
    rollout, _ = asked(
        {"choices": [CHOICE | {"token_ids": [1, 2, 3], "finish_reason": "length", "logprobs": None}]},
        wants_logprobs=False,
    )
    assert not rollout.finished
    assert rollout.logprobs is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "abort"}, "finish_reason 'abort'"),
        ({"finish_reason": "length"}, "ended with finish_reason 'length'"),
        ({"token_ids": [1, 2]}, "of 2 tokens ended with finish_reason 'stop'"),
        ({"token_ids": [1, 2, 3, 9]}, "of 4 tokens"),
        ({"token_ids": [], "finish_reason": "length"}, "of 0 tokens"),
        ({"token_ids": [1], "finish_reason": "length"}, "cut after 1 of 3 tokens"),
        ({"weight_versions": None}, "with weights no version, not v"),
        ({"weight_versions": [SPAN | {"version": "u"}]}, "with weights u, not v"),
        ({"weight_versions": [SPAN | {"end": 1}, SPAN | {"version": "u", "start": 1}]}, "with weights u, v, not v"),
        ({"logprobs": {"content": CONTENT[:2]}}, "not those of the tokens"),
        ({"logprobs": None}, "the answer has no logprobs.content"),
    ],
)
def test_answers_that_are_refused(changes, message):
    with pytest.raises(ServerError, match=message):
        asked({"choices": [CHOICE | changes]})


def test_a_status_or_an_answer_that_is_none():
    with pytest.raises(ServerError, match=r"answered with status 500: .*broken"):
        asked({"error": "broken"}, status=500)
    with pytest.raises(ServerError, match=r"the answer has no choices\.0: is the server of vLLM 0\.32"):
        asked({})


def test_a_hung_engine_ends_what_waits_for_it():
    """The response never comes, and the engine stops answering after its first probe."""
    probes = itertools.count(1)

    async def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/is_paused" and next(probes) < 3:
            return httpx.Response(200, json={"is_paused": False})
        if request.url.path == "/is_paused":
            raise httpx.ReadTimeout("slow", request=request)
        if request.url.path == "/metrics":
            return httpx.Response(200, text="")
        await asyncio.sleep(60)
        raise AssertionError

    async def ask():
        client = Client("http://server:1", timeout=0.2)
        client._http = httpx.AsyncClient(base_url=client.url, transport=httpx.MockTransport(respond))
        async with client.watched():
            await client.generate(REQUEST, SAMPLING, version="v", wants_logprobs=True)

    with pytest.raises(ServerError, match=r"/is_paused got no answer \(ReadTimeout"):
        asyncio.run(ask())


@pytest.mark.parametrize("counts", [True, False])
def test_an_engine_that_computes_nothing_counts_as_hung(counts):
    """It answers, but a response never comes. As long as it computes tokens, the response is waited for."""
    computed = itertools.count(5)

    async def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            seen = next(computed) if counts else 5
            return httpx.Response(200, text=f'a 1\nvllm:iteration_tokens_total_sum{{engine="0"}} {seen}.0\n')
        if request.url.path == "/is_paused":
            return httpx.Response(200, json={"is_paused": False})
        await asyncio.sleep(1.2 if counts else 60)
        return httpx.Response(200, json={"choices": [CHOICE]})

    async def ask():
        client = Client("http://server:1", timeout=0.3)
        client._http = httpx.AsyncClient(base_url=client.url, transport=httpx.MockTransport(respond))
        async with client.watched():
            return await client.generate(REQUEST, SAMPLING, version="v", wants_logprobs=True)

    if counts:
        assert asyncio.run(ask()).response_ids == (1, 2, 9)
        return
    with pytest.raises(ServerError, match=r"has computed no token for 0\.3 s, with open requests"):
        asyncio.run(ask())


def test_requests_are_checked_before_they_are_sent():
    limits = {"vocab_size": 7, "max_model_len": 5}
    check_requests([REQUEST], SAMPLING, **limits)
    with pytest.raises(UserError, match="holds id 6, and the model has ids 0 to 5"):
        check_requests([REQUEST], SAMPLING, vocab_size=6, max_model_len=5)
    with pytest.raises(UserError, match=r"may have 5 tokens, and the vLLM server takes 4: raise that"):
        check_requests([REQUEST], SAMPLING, vocab_size=7, max_model_len=4)
    for temperature in (2.5, 0.005):
        with pytest.raises(UserError, match=rf"temperature is {temperature}, and vLLM takes 0, and 0\.01 to 2: change"):
            check_requests([REQUEST], dataclasses.replace(SAMPLING, temperature=temperature), **limits)
    check_requests([REQUEST], dataclasses.replace(SAMPLING, temperature=0.0), **limits)
    empty = GenerationRequest(problem_id="e", sample_index=0, prompt_ids=(), key=1)
    with pytest.raises(UserError, match="'e': its prompt has no token"):
        check_requests([empty], SAMPLING, **limits)


@pytest.mark.parametrize(
    ("cut", "greedy", "mode"),
    [
        ([0.0, 0.0], [-2.0, -1e-9], "processed_logprobs"),  # the second prompt proves nothing
        ([-0.6931, 0.0], [-1.5, -2.0], "processed_logprobs"),  # two tokens were equally likely after the first one
        ([-2.0, 0.0], [-2.0, -1e-9], "raw_logprobs"),
        ([-2.0, -3.0], [-2.00001, -3.0], "raw_logprobs"),
        ([7.0, -3.0], [7.0, -3.0], "raw_logits or processed_logits"),
        ([0.0, 0.0], [-1e-9, 0.0], None),  # the model is sure of both tokens
    ],
)
def test_the_mode_of_log_probabilities(cut, greedy, mode):
    assert mode_from(cut=cut, greedy=greedy) == mode


def make_requests(lengths, *, samples=1):
    return {
        number: GenerationRequest(problem_id=f"p{i}", sample_index=s, prompt_ids=tuple(range(i, i + n)), key=number)
        for number, (i, n, s) in enumerate((i, n, s) for i, n in enumerate(lengths) for s in range(samples))
    }


def test_prompts_are_balanced_by_length():
    parts = balanced(make_requests([90, 10, 40, 50, 20, 30]), 2, response=10)
    assert sorted(number for part in parts for number in part) == [0, 1, 2, 3, 4, 5]
    assert [[(90, 10, 40, 50, 20, 30)[i] for i in part] for part in parts] == [[90, 30, 10], [50, 40, 20]]


def test_samples_of_a_problem_stay_together():
    parts = balanced(make_requests([10, 10, 10, 10], samples=4), 2, response=5)
    assert [sorted(part) for part in parts] == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def test_one_problem_with_many_samples_is_divided():
    parts = balanced(make_requests([10], samples=6), 3, response=5)
    assert sorted(map(sorted, parts)) == [[0, 1], [2, 3], [4, 5]]


def test_more_servers_than_requests():
    assert sorted(map(len, balanced(make_requests([4, 5]), 3, response=1))) == [0, 1, 1]


def test_the_command_and_environment_of_a_server(tmp_path):
    settings = VllmSettings(
        command=("vllm", "serve"),
        servers=2,
        devices=("6,7", "5"),
        tensor_parallel=2,
        extra_args=("--seed", "1"),
        environment={"A": "b"},
        max_model_len=100,
    )
    engine = ServerOptions(settings=settings, dtype="bfloat16", logprobs_mode="raw_logprobs")
    command = server_command(engine, tmp_path, 8123)
    assert command[:6] == ["vllm", "serve", "--model", str(tmp_path), "--host", "127.0.0.1"]
    text = " ".join(command)
    assert "--tensor-parallel-size 2" in text
    assert "--gpu-memory-utilization 0.9" in text
    assert "--max-model-len 100" in text
    assert '{"backend": "megatron_paint_file"}' in text
    assert command[-2:] == ["--seed", "1"]
    assert "--no-enable-chunked-prefill" not in text
    on_cpus = server_command(dataclasses.replace(engine, on_gpus=False), tmp_path, 8123)
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(on_cpus)
    base = {"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "SLURM_JOB_ID": "1", "HOME": "/h"}
    found = server_environment(engine, 0, base)
    assert found["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert (found["HOME"], found["A"], found["VLLM_SERVER_DEV_MODE"]) == ("/h", "b", "1")
    assert not found.keys() & {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"}


@pytest.mark.parametrize(("transfer", "sleeps"), [("nccl", False), ("ipc", True)])
def test_the_command_and_environment_of_a_transfer_between_gpus(transfer, sleeps, tmp_path):
    settings = VllmSettings(devices=("0",), transfer=transfer)
    engine = ServerOptions(settings=settings, dtype="bfloat16", logprobs_mode="raw_logprobs", transfer=transfer)
    command = server_command(engine, tmp_path, 8123)
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": transfer}
    assert ("--enable-sleep-mode" in command) == sleeps
    base = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "x"}
    found = server_environment(engine, 0, base)
    assert (found.get("VLLM_ALLOW_INSECURE_SERIALIZATION") == "1") == sleeps
    assert found.keys() & base.keys() == (set() if sleeps else base.keys())
    # An evaluation transfers nothing, whatever the settings of its run say.
    engine = ServerOptions(settings=settings, dtype="bfloat16", logprobs_mode="raw_logprobs")
    assert '{"backend": "megatron_paint_file"}' in server_command(engine, tmp_path, 8123)
