"""Which GPUs servers may have, by how weights reach them."""

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.vllm import VllmSettings
from megatron_paint.training.engines import check_gpus, gpus_of_ranks
from tests.support import fake_vllm


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_a_machine_without_gpus_is_refused(transfer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"^rollout.vllm.transfer={transfer} sends weights from GPU to GPU, and this"):
        check_gpus(VllmSettings(transfer=transfer, devices=("0",)))
    check_gpus(VllmSettings())  # files need none


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [
        ({}, 1, ["0"]),
        ({}, 8, ["0"]),
        ({"LOCAL_WORLD_SIZE": "2", "RANK": "1"}, 4, ["0", "1"]),
        ({"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,6,7"}, 3, ["4", "6"]),
        ({"RANK": "3", "CUDA_VISIBLE_DEVICES": "0"}, 1, None),  # srun shows each task its own GPU as 0
    ],
)
def test_the_gpus_of_the_ranks(environment, count, expected):
    assert gpus_of_ranks(environment, count) == expected


@pytest.mark.parametrize(
    ("transfer", "devices", "message"),
    [
        ("nccl", ("2", "3"), None),
        ("nccl", (), None),  # servers of urls
        ("nccl", ("2,1",), "names GPU 1 of the ranks, and NCCL cannot send from a GPU to itself"),
        ("ipc", ("0, 1",), None),
        ("ipc", ("GPU-8f6a52c1-0000-4b1e-9d3c-3a5f0c2d7e11",), None),  # a UUID does not tell which number it has
        ("ipc", ("0", "2"), r"names GPU 2, which no rank has \(theirs: 0, 1\)"),
        ("file", ("2", "3"), None),
        ("file", ("2", "1"), r"names GPU 1, which a rank has \(theirs: 0, 1\), and a server takes 0.9 of a GPU's"),
        ("file", (), r"is empty, so servers take those of ranks \(theirs: 0, 1\)"),
    ],
)
def test_the_gpus_of_the_servers(transfer, devices, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, module in fake_vllm.modules(tmp_path).items():
        monkeypatch.setitem(fake_vllm.sys.modules, name, module)
    settings = VllmSettings(transfer=transfer, devices=devices, servers=max(1, len(devices)))
    if message is None:
        check_gpus(settings)
        return
    with pytest.raises(UserError, match=message):
        check_gpus(settings)


def test_servers_of_files_may_share_a_gpu_on_purpose(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpus(VllmSettings(devices=("0",), gpu_memory=0.4))
    check_gpus(VllmSettings(urls=("http://node7:8000",)))
