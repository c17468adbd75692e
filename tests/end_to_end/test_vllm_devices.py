"""Whole runs that send weights without files: vLLM is a stand-in with its order of calls and collectives."""

import json
import sys
from pathlib import Path

import pytest

from tests.support import forked_ranks, tiny
from tests.support.results import metrics

ROOT = Path(__file__).parents[2]
STAND_IN = f"[{sys.executable},-m,tests.support.vllm_stand_in]"
STEPS, SAMPLES = 3, 4
TP, PP = "tensor_model_parallel_size: 2, sequence_parallel: true", "pipeline_model_parallel_size: 2"
LAYOUTS = {"dp2": (2, ""), "tp2-pp2": (4, f"{TP}, {PP}")}
SERVERS = {
    ("nccl", "dp2"): "servers: 2",
    ("nccl", "tp2-pp2"): "servers: 2, tensor_parallel: 2",
    ("ipc", "dp2"): "servers: 2, devices: ['0', '1']",
    ("ipc", "tp2-pp2"): "servers: 2, tensor_parallel: 2, devices: ['0,1', '2,3']",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model and problems by whether the head is tied."""
    folder = tmp_path_factory.mktemp("models")
    problems = tiny.make_problems(folder / "problems.jsonl")
    return {tied: (tiny.make_model(folder / f"model-{tied}", tied=tied), problems) for tied in (False, True)}


def train(
    folder: Path, model: tuple[Path, Path], transfer: str, layout: str, *overrides: str, fault: dict | None = None
):
    processes, megatron = LAYOUTS[layout]
    settings = tiny.make_settings(folder, *model, layout=megatron)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if fault:
        environment["STAND_IN_FAULT"] = json.dumps(fault | {"marker": str(folder / "marker")})
    ours = f"transfer: {transfer}, hang_timeout_s: 60.0, command: {STAND_IN}, {SERVERS[transfer, layout]}"
    text = settings.read_text().replace(
        "rollout: {",
        f"rollout: {{engine: vllm, transfer_bytes: 6000, vllm: {{{ours}, environment: {json.dumps(environment)}}}, ",
    )
    settings.write_text(
        text.replace("steps: 4, save_every: 2, evaluate_every: 2", f"steps: {STEPS}, save_every: 2, evaluate_every: 2")
    )
    memory = folder / "memory"
    memory.mkdir()
    return forked_ranks.run(
        folder,
        memory,
        "train",
        settings,
        *overrides,
        "--json",
        target="tests.support.device_run:run",
        processes=processes,
    )


def check(run: Path) -> None:
    """Every token was sampled with the weights that its step started from, and these are the trainer's."""
    files = sorted((run / "samples").glob("step_*.jsonl"))
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(step) for step in lines] == [SAMPLES] * STEPS
    for sample in (sample for step in lines for sample in step):
        (span,) = sample["origin"]["weights"]
        assert (span["start"], span["end"]) == (0, len(sample["response_ids"]))
        assert int(span["version"].partition("/")[2]) == sample["step"] - 1
    for step in metrics(run):
        assert step["sampler_gap/max"] < 1e-4
        assert step["rollout/spot_check_gap"] < 1e-4
    assert len(list((run / "eval").glob("*.json"))) == 3


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("transfer", "layout"), [pytest.param(*one, marks=pytest.mark.long if one[1] == "dp2" else ()) for one in SERVERS]
)
def test_a_run(transfer, layout, tied, models, tmp_path):
    ended = train(tmp_path, models[tied], transfer, layout)
    assert ended.statuses == [0] * LAYOUTS[layout][0], ended
    check(tmp_path / "run")


@pytest.mark.parametrize(
    ("transfer", "path", "count", "do", "restarted"),
    [
        ("nccl", "/update_weights", 2, "exit", 2),
        pytest.param("nccl", "/inference/v1/generate", 12, "exit", 1, marks=pytest.mark.long),
        pytest.param("ipc", "/update_weights", 9, "exit", 1, marks=pytest.mark.long),
        pytest.param("ipc", "/sleep", 3, "status", 1, marks=pytest.mark.long),
    ],
)
def test_a_server_fails(transfer, path, count, do, restarted, models, tmp_path):
    """Servers of a group are started again together; others alone. LoRA's adapters are merged."""
    fault = {"path": path, "count": count, "do": do}
    lora = ("model.lora={rank: 4, alpha: 8.0}",)
    ended = train(tmp_path, models[True], transfer, "tp2-pp2", *lora, fault=fault)
    assert ended.statuses == [0] * 4, ended
    assert (tmp_path / "marker").exists()
    check(tmp_path / "run")
    notes = [json.loads(line).get("message", "") for line in ended.out[0].splitlines()]
    assert sum("is started again" in note for note in notes) == restarted
