"""Weights without files: the order of calls, what each worker gets, and what happens when a server fails.

The servers are stand-ins, and vLLM's trainer side is `fake_vllm.py`. `tests/end_to_end/test_vllm_devices.py` has more
than one rank.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.vllm import VllmSettings
from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters
from megatron_paint.rollouts.vllm.client import Client
from megatron_paint.rollouts.vllm.command import ServerOptions
from megatron_paint.rollouts.vllm.device_transfer import DeviceTransfer, address_for
from megatron_paint.rollouts.vllm.fleet import Fleet
from megatron_paint.rollouts.vllm.sampler import VllmSampler
from megatron_paint.rollouts.vllm.spot_check import SpotCheck
from megatron_paint.runtime.rank_zero import directly
from tests.support import fake_vllm, tiny
from tests.support.folder_weights import FolderWeights
from tests.support.numpy_qwen3 import NumpyQwen3, log_softmax

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "tests.support.vllm_stand_in")
MESSAGE_BYTES = 6000
PROMPTS = ((1, 2, 3), tuple(range(40, 80)), tuple(range(100, 120)))  # one or more blocks of the cache, and none
TOKENS = 3
UPDATE = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache")
UPDATED = ("/weight_info", "/resume")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [tiny.make_model(folder / str(seed), seed=seed, tied=False) for seed in range(4)]


class Run:
    """A sampler with one rank. `calls` holds what every server was asked, in order: (server, path, query)."""

    def __init__(self, transfer, folders, folder, monkeypatch, *, fault=None, servers=2, workers=1) -> None:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if fault:
            environment["STAND_IN_FAULT"] = json.dumps(fault | {"marker": str(folder / "marker")})
        settings = VllmSettings(
            command=COMMAND,
            environment=environment,
            servers=servers,
            devices=("0",) * servers if transfer == "ipc" else (),
            tensor_parallel=workers,
            transfer=transfer,
            hang_timeout_s=4.0,
        )
        monkeypatch.setattr(fake_vllm, "LIMIT", 2.0)
        for name, module in fake_vllm.modules(folder).items():
            monkeypatch.setitem(sys.modules, name, module)
        self.calls: list[tuple[int, str, object]] = []
        request = Client._response

        async def noted(client, method, path, **arguments):
            self.calls.append((self.number(client), path, arguments.get("params") or arguments.get("json")))
            return await request(client, method, path, **arguments)

        monkeypatch.setattr(Client, "_response", noted)
        self.notes: list[str] = []
        engine = ServerOptions(
            settings=settings, dtype="float32", logprobs_mode="raw_logprobs", on_gpus=False, transfer=transfer
        )
        self.fleet = Fleet(engine, vocab_size=tiny.ROWS, logs=folder / "logs", note=self.notes.append)
        self.folders, self.current = folders, folders[0]
        self.fleet.start(folders[0])
        self.weights = FolderWeights(folders[0], tied=False)
        self.transfer = DeviceTransfer(
            self.weights,
            transfer=transfer,
            rank=0,
            message_bytes=MESSAGE_BYTES,
            on_rank_zero=directly,
            everyone=lambda act: [act()],
        )
        self.fleet.wait_until_ready(self.transfer.init_info)
        self.sampler = VllmSampler(
            self.fleet,
            weights=self.weights,
            transfer=self.transfer,
            spot_check=SpotCheck(self.score, limit=1e-6),
            start_model=folders[0],
            exports=folder / "exports",
            on_rank_zero=directly,
        )

    def number(self, client: Client) -> int:
        return next(number for number, server in self.fleet._servers.items() if server.client is client)

    def score(self, sequences) -> list[tuple[float, ...]]:
        """Log-probabilities of the newest weights, in numpy."""
        model = NumpyQwen3(self.current)
        found = []
        for one in sequences:
            ids = (*one.prompt_ids, *one.response_ids)
            places = range(len(one.prompt_ids), len(ids))
            found.append(tuple(float(log_softmax(model.logits(ids[:place]))[ids[place]]) for place in places))
        return found

    def update(self, number: int) -> None:
        """New weights, and samples with them, which must be greedy tokens of these weights on every server."""
        self.current = self.folders[number]
        self.weights.take(self.current)
        self.sampler.sync_weights(number + 1)
        requests = [
            GenerationRequest(problem_id=f"p{i}", sample_index=0, prompt_ids=prompt, key=i)
            for i, prompt in enumerate(PROMPTS)
        ]
        greedy = SamplingParameters(max_new_tokens=TOKENS, temperature=0.0, top_p=1.0, top_k=0, stop_ids=frozenset())
        rollouts = self.sampler.generate(requests, greedy)
        model = NumpyQwen3(self.current)
        for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
            ids = list(prompt)
            for _ in range(TOKENS):
                ids.append(int(model.logits(ids).argmax()))
            assert rollout.response_ids == tuple(ids[len(prompt) :])
            assert [span.version.partition("/")[2] for span in rollout.origin.weights] == [str(number)]
        assert self.sampler.metrics()["rollout/spot_check_gap"] < 1e-9

    def paths(self, server: int) -> list[str]:
        """What a server was asked, without questions on its state, samples, and repeated messages of one update."""
        left_out = ("/is_paused", "/v1/models", "/inference/v1/generate", "/metrics")
        found = [path for number, path, _ in self.calls if number == server and path not in left_out]
        return [path for i, path in enumerate(found) if i == 0 or path != found[i - 1]]

    def close(self) -> None:
        self.sampler.close()
        self.transfer.close()
        self.fleet.close()


@pytest.fixture
def start(folders, tmp_path, monkeypatch):
    runs = []

    def begin(transfer, **how) -> Run:
        runs.append(Run(transfer, folders, tmp_path, monkeypatch, **how))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def test_one_group_holds_all_workers(start):
    """World size, and the place of each server's workers; one message tells names, types and shapes."""
    run = start("nccl", workers=2)
    for number in (1, 2):
        run.update(number)
    for server in (0, 1):
        group = ["/shutdown_weight_transfer_engine", "/get_world_size", "/init_weight_transfer_engine"]
        assert run.paths(server) == [*group, *2 * (*UPDATE, *UPDATED)]
    infos = {number: asked["init_info"] for number, path, asked in run.calls if path == "/init_weight_transfer_engine"}
    assert [infos[server].pop("rank_offset") for server in (0, 1)] == [1, 3]
    assert infos[0] == infos[1]
    assert infos[0]["world_size"] == 5
    assert infos[0]["packed"]
    largest = 4 * tiny.ROWS * 32  # the embedding: a buffer holds every tensor
    assert infos[0]["packed_buffer_size_bytes"] == largest > MESSAGE_BYTES
    updates = [asked["update_info"] for _, path, asked in run.calls if path == "/update_weights"]
    assert len(updates) == 4  # one a server and update
    assert all(update == updates[0] for update in updates)
    shapes = dict(zip(updates[0]["names"], map(tuple, updates[0]["shapes"]), strict=True))
    assert shapes == {name: tensor.shape for name, tensor in NumpyQwen3(run.current).weights.items()}
    assert set(updates[0]["dtype_names"]) == {"float32"}


def test_servers_sleep_between_updates(start):
    """Memory for weights comes before an update, memory for keys and values after it. Sleeping weights are lost."""
    run = start("ipc")
    run.fleet.sleep()
    for number in (1, 2):
        run.update(number)
        run.sampler.release_memory()
        run.sampler.release_memory()  # they sleep already
    awake = (*UPDATE[:-1], "/wake_up", UPDATE[-1], *UPDATED)
    one = ["/wake_up", *awake, "/sleep"]
    assert run.paths(0) == ["/sleep", "/init_weight_transfer_engine", *one, *one]
    tags = [asked["tags"] for number, path, asked in run.calls if path == "/wake_up" and number == 0]
    assert tags == 2 * ["weights", "kv_cache"]
    assert all(asked == {"level": 2, "mode": "wait"} for _, path, asked in run.calls if path == "/sleep")
    updates = [asked["update_info"] for number, path, asked in run.calls if path == "/update_weights" and number == 0]
    assert len(updates) > 4
    assert all(sum(update["tensor_sizes"]) <= 4 * tiny.ROWS * 32 for update in updates)
    assert not any("ipc_handles" in update for update in updates)  # JSON has no tuples


def test_the_same_weights_are_sent_again_after_a_sleep(start):
    run = start("ipc", servers=1)
    run.fleet.sleep()
    run.update(1)
    run.sampler.release_memory()
    run.update(1)
    assert not run.fleet.live[0].asleep


@pytest.mark.parametrize(
    ("path", "count", "do", "together"),
    [
        ("/get_world_size", 1, "status", True),
        pytest.param("/init_weight_transfer_engine", 1, "exit", True, marks=pytest.mark.long),
        ("/init_weight_transfer_engine", 1, "status", True),
        pytest.param("/pause", 2, "status", True, marks=pytest.mark.long),
        ("/start_weight_update", 2, "exit", True),
        pytest.param("/update_weights", 2, "exit", True, marks=pytest.mark.long),
        pytest.param("/update_weights", 2, "hang", True, marks=pytest.mark.long),
        ("/update_weights", 2, "leave", True),
        ("/finish_weight_update", 2, "status", False),
        pytest.param("/reset_prefix_cache", 2, "exit", False, marks=pytest.mark.long),
    ],
)
def test_a_server_of_a_group_fails(path, count, do, together, start, tmp_path):
    """Before the end of an update all servers are started again, after it the one; the next update has a new group."""
    run = start("nccl", fault={"path": path, "count": count, "do": do})
    for number in (1, 2, 3):
        run.update(number)
    assert (tmp_path / "marker").exists()
    assert len(run.notes) == (2 if together else 1)
    assert all("is started again" in note for note in run.notes)
    assert sum(path in note for note in run.notes) == len(run.notes)  # each says why
    assert len(run.fleet.live) == 2
    assert run.transfer.client.is_complete
    groups = [
        asked["init_info"]["master_port"] for _, path, asked in run.calls if path == "/init_weight_transfer_engine"
    ]
    assert len(set(groups)) == (1 if path == "/get_world_size" else 2)  # there was none before the first answer


@pytest.mark.parametrize(
    ("path", "count", "do"),
    [
        pytest.param("/start_weight_update", 2, "exit", marks=pytest.mark.long),
        ("/update_weights", 8, "status"),
        ("/wake_up", 3, "exit"),
        pytest.param("/sleep", 2, "hang", marks=pytest.mark.long),
    ],
)
def test_a_server_on_a_shared_gpu_fails_alone(path, count, do, start, tmp_path):
    run = start("ipc", fault={"path": path, "count": count, "do": do})
    run.fleet.sleep()
    for number in (1, 2, 3):
        run.update(number)
        run.sampler.release_memory()
    assert (tmp_path / "marker").exists()
    (note,) = run.notes
    assert "is started again" in note
    assert path in note
    assert len(run.fleet.live) == 2


def test_an_error_of_rank_0_ends_the_group(start, monkeypatch):
    """As one of NCCL would: nobody waits, all servers are started again, and the next group works."""
    run = start("nccl")
    run.update(1)
    group, send = run.transfer.engine.model_update_group, type(run.transfer.engine.model_update_group).send
    monkeypatch.setattr(
        type(group), "send", lambda group, content: (_ for _ in ()).throw(RuntimeError("NCCL error: 3"))
    )
    run.weights.take(run.folders[2])
    run.current = run.folders[2]
    run.sampler.sync_weights(3)
    assert len(run.notes) == 2
    assert all("sending weights failed on rank 0: NCCL error: 3" in note for note in run.notes)
    monkeypatch.setattr(type(group), "send", send)
    run.update(3)


def test_vllm_must_be_importable(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"rollout\.vllm\.transfer=nccl needs vLLM 0\.32 or newer in the Python env"):
        DeviceTransfer(
            FolderWeights(folders[0], tied=False),
            transfer="nccl",
            rank=0,
            message_bytes=1,
            on_rank_zero=directly,
            everyone=lambda act: [act()],
        )


def test_weights_that_are_not_finite_are_not_sent(start):
    run = start("nccl", servers=1)
    run.weights.tensors["model.norm.weight"][0] = np.nan
    with pytest.raises(AssertionError):  # of FolderWeights
        run.sampler.sync_weights(2)
    assert not run.paths(0)


def test_the_address_of_this_machine():
    assert address_for(()) == "127.0.0.1"
    assert address_for(("http://127.0.0.1:8000",)) == "127.0.0.1"
    with pytest.raises(UserError, match=r"rollout\.vllm\.urls: http://nowhere\.invalid:1 cannot be reached"):
        address_for(("http://nowhere.invalid:1",))
