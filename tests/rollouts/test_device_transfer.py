"""Weights without files: the order of calls, what each worker gets, and what happens when a server fails.

The servers are stand-ins, and vLLM's trainer side is `fake_vllm.py`. `tests/end_to_end/test_vllm_devices.py` has more
than one rank.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.rollouts.vllm.client import Client
from megatron_paint.rollouts.vllm.device_transfer import DeviceTransfer, address_for
from megatron_paint.runtime.rank_zero import directly
from tests.support import fake_vllm, tiny
from tests.support.device_updates import MESSAGE_BYTES, Run
from tests.support.folder_weights import FolderWeights
from tests.support.numpy_qwen3 import NumpyQwen3

UPDATE = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache")
UPDATED = ("/weight_info", "/resume")
LEFT_OUT = ("/is_paused", "/v1/models", "/inference/v1/generate", "/metrics")
LARGEST = 4 * tiny.ROWS * 32  # bytes of the embedding


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [tiny.make_model(folder / str(seed), seed=seed, tied=False) for seed in range(4)]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str, object]]:
    """What servers are asked, in order: address, path, and what is sent."""
    found, request = [], Client._response

    async def noted(client, method, path, **arguments):
        found.append((client.url, path, arguments.get("params") or arguments.get("json")))
        return await request(client, method, path, **arguments)

    monkeypatch.setattr(Client, "_response", noted)
    return found


@pytest.fixture
def start(folders, tmp_path, monkeypatch):
    for name, module in fake_vllm.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    runs = []

    def begin(transfer, **how) -> Run:
        runs.append(Run(transfer, folders, tmp_path, **how))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def asked_of(run: Run, calls: list, number: int, path: str) -> list:
    """What a server that was never started again was sent to a path."""
    url = run.fleet._servers[number].client.url
    return [asked for address, at, asked in calls if (address, at) == (url, path)]


def paths_of(run: Run, calls: list, number: int) -> list[str]:
    """The paths that such a server was asked, without samples and its state; messages of one update count once."""
    url = run.fleet._servers[number].client.url
    found = [path for address, path, _ in calls if address == url and path not in LEFT_OUT]
    return [path for i, path in enumerate(found) if i == 0 or path != found[i - 1]]


def test_one_group_holds_all_workers(start, calls):
    """World size, and the place of each server's workers; one message has names, types and shapes."""
    run = start("nccl", workers=2)
    for number in (1, 2):
        run.update(number)
    for server in (0, 1):
        group = ["/shutdown_weight_transfer_engine", "/get_world_size", "/init_weight_transfer_engine"]
        assert paths_of(run, calls, server) == [*group, *2 * (*UPDATE, *UPDATED)]
    ((first,), (second,)) = (asked_of(run, calls, server, "/init_weight_transfer_engine") for server in (0, 1))
    infos = [dict(first["init_info"]), dict(second["init_info"])]
    assert [info.pop("rank_offset") for info in infos] == [1, 3]
    assert infos[0] == infos[1]
    assert infos[0]["world_size"] == 5
    assert infos[0]["packed"]
    assert infos[0]["packed_buffer_size_bytes"] == LARGEST > MESSAGE_BYTES
    updates = [asked["update_info"] for server in (0, 1) for asked in asked_of(run, calls, server, "/update_weights")]
    assert len(updates) == 4  # one a server and update
    assert all(update == updates[0] for update in updates)
    shapes = dict(zip(updates[0]["names"], map(tuple, updates[0]["shapes"]), strict=True))
    assert shapes == {name: tensor.shape for name, tensor in NumpyQwen3(run.current).weights.items()}
    assert set(updates[0]["dtype_names"]) == {"float32"}


def test_servers_sleep_between_updates(start, calls):
    """Memory for weights comes before an update, memory for keys and values after it. Sleeping weights are lost."""
    run = start("ipc")
    run.fleet.sleep()
    for number in (1, 2):
        run.update(number)
        run.sampler.release_memory()
        run.sampler.release_memory()  # they sleep already
    awake = (*UPDATE[:-1], "/wake_up", UPDATE[-1], *UPDATED)
    one = ["/wake_up", *awake, "/sleep"]
    assert paths_of(run, calls, 0) == ["/sleep", "/init_weight_transfer_engine", *one, *one]
    assert [asked["tags"] for asked in asked_of(run, calls, 0, "/wake_up")] == 2 * ["weights", "kv_cache"]
    assert asked_of(run, calls, 0, "/sleep") == 3 * [{"level": 2, "mode": "wait"}]
    updates = [asked["update_info"] for asked in asked_of(run, calls, 0, "/update_weights")]
    assert len(updates) > 4
    assert all(sum(update["tensor_sizes"]) <= LARGEST for update in updates)
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
        pytest.param("/get_world_size", 1, "status", True, marks=pytest.mark.long),
        pytest.param("/init_weight_transfer_engine", 1, "exit", True, marks=pytest.mark.long),
        pytest.param("/init_weight_transfer_engine", 1, "status", True, marks=pytest.mark.long),
        pytest.param("/pause", 2, "status", True, marks=pytest.mark.long),
        pytest.param("/start_weight_update", 2, "exit", True, marks=pytest.mark.long),
        pytest.param("/update_weights", 2, "exit", True, marks=pytest.mark.long),
        pytest.param("/update_weights", 2, "hang", True, marks=pytest.mark.long),
        ("/update_weights", 2, "leave", True),
        ("/finish_weight_update", 2, "status", False),
        pytest.param("/reset_prefix_cache", 2, "exit", False, marks=pytest.mark.long),
    ],
)
def test_a_server_of_a_group_fails(path, count, do, together, start, calls, tmp_path, monkeypatch):
    """Before the end of an update all servers are started again, after it the one; the next update has a new group."""
    if path == "/init_weight_transfer_engine":
        monkeypatch.setattr(fake_vllm, "LIMIT", 5.0)  # so long does rank 0 wait for the servers
    fault = {"path": path, "count": count, "do": do}
    run = start("nccl", fault=fault, hang_timeout=5.0 if do == "hang" else 30.0)
    for number in (1, 2, 3):
        run.update(number)
    assert (tmp_path / "marker").exists()
    assert len(run.notes) == (2 if together else 1)
    assert all("is started again" in note for note in run.notes)
    assert sum(path in note for note in run.notes) == len(run.notes)  # each says why
    assert len(run.fleet.live) == 2
    assert run.transfer.client.is_complete
    groups = [asked["init_info"]["master_port"] for _, path, asked in calls if path == "/init_weight_transfer_engine"]
    assert len(set(groups)) == (1 if path == "/get_world_size" else 2)  # there was none before the first answer


@pytest.mark.parametrize(
    ("path", "count", "do"),
    [
        pytest.param("/start_weight_update", 2, "exit", marks=pytest.mark.long),
        pytest.param("/update_weights", 8, "status", marks=pytest.mark.long),
        ("/wake_up", 3, "exit"),
        pytest.param("/sleep", 2, "hang", marks=pytest.mark.long),
    ],
)
def test_a_server_on_a_shared_gpu_fails_alone(path, count, do, start, tmp_path):
    fault = {"path": path, "count": count, "do": do}
    run = start("ipc", fault=fault, hang_timeout=5.0 if do == "hang" else 30.0)
    run.fleet.sleep()
    for number in (1, 2, 3):
        run.update(number)
        run.sampler.release_memory()
    assert (tmp_path / "marker").exists()
    (note,) = run.notes
    assert "is started again" in note
    assert path in note
    assert len(run.fleet.live) == 2
    assert run.weights.freed == 3 + 1  # before each update, and before the server is started again


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


def test_weights_that_are_not_finite_are_not_sent(start, calls):
    run = start("nccl", servers=1)
    run.weights.tensors["model.norm.weight"][0] = np.nan
    with pytest.raises(AssertionError):  # of FolderWeights
        run.sampler.sync_weights(2)
    assert not paths_of(run, calls, 0)


def test_the_address_of_this_machine():
    assert address_for(()) == "127.0.0.1"
    assert address_for(("http://127.0.0.1:8000",)) == "127.0.0.1"
    with pytest.raises(UserError, match=r"rollout\.vllm\.urls: http://nowhere\.invalid:1 cannot be reached"):
        address_for(("http://nowhere.invalid:1",))
