"""Whole runs whose rollouts come from servers: a stand-in of vLLM with its endpoints and traps, and with faults."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import forked_ranks, tiny
from tests.support.results import metrics

STAND_IN = f"[{sys.executable},-m,tests.support.vllm_stand_in]"
STEPS, SAMPLES = 3, 4
TP, PP = "tensor_model_parallel_size: 2, sequence_parallel: true", "pipeline_model_parallel_size: 2"
LAYOUTS = {"dp2": (2, ""), "tp2": (2, TP), "tp2-pp2": (4, f"{TP}, {PP}")}
SERVER_ENDS = ("exit", "hang", "status")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.make_model(folder / "model", tied=False), tiny.make_problems(folder / "problems.jsonl")


def write_settings(folder: Path, model: tuple[Path, Path], *, layout: str = "", fault: dict | None = None) -> Path:
    """Settings of a short run with two servers. fault: of the first server that meets it."""
    settings = tiny.make_settings(folder, *model, layout=layout)
    fault = fault and json.dumps(fault | {"marker": str(folder / "marker")})
    environment = {
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "OMP_NUM_THREADS": "1",
        **({"STAND_IN_FAULT": fault} if fault else {}),
    }
    ours = f"engine: vllm, transfer_bytes: 20000, vllm: {{servers: 2, hang_timeout_s: 6.0, command: {STAND_IN}"
    text = settings.read_text().replace("rollout: {", f"rollout: {{{ours}, environment: {json.dumps(environment)}}}, ")
    settings.write_text(
        text.replace("steps: 4, save_every: 2, evaluate_every: 2", f"steps: {STEPS}, save_every: 2, evaluate_every: 3")
    )
    return settings


def samples_of(run: Path) -> list[dict]:
    """All samples of a finished run, which must be complete."""
    files = sorted((run / "samples").glob("step_*.jsonl"))
    assert len(files) == STEPS
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(step) for step in lines] == [SAMPLES] * STEPS
    return [line for step in lines for line in step]


def check(run: Path) -> None:
    """Every token was sampled with the weights that its step started from, and no weight is the trainer's alone."""
    for sample in samples_of(run):
        (span,) = sample["origin"]["weights"]
        assert (span["start"], span["end"]) == (0, len(sample["response_ids"]))
        assert int(span["version"].partition("/")[2]) == sample["step"] - 1
        assert sample["origin"]["finish_reason"] == ("stop" if sample["finished"] else "length")
    for step in metrics(run):
        assert 0 < step["sampler_gap/max"] < 1e-4  # the sampled tokens' log-probabilities are the trainer's
        assert step["rollout/spot_check_gap"] < 1e-4


def nothing_is_left(folder: Path) -> bool:
    """No process of the servers, and none of their files."""
    running = [
        entry
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if entry.exists() and str(folder).encode() in entry.read_bytes()
    ]
    return not running and not [path for path in Path("/dev/shm").glob("megatron_paint_*") if folder_of(path) == folder]


def folder_of(path: Path) -> Path | None:
    marker = path / "run"
    return Path(marker.read_text()) if marker.exists() else None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run(layout, model, tmp_path):
    processes, megatron = LAYOUTS[layout]
    settings = write_settings(tmp_path, model, layout=megatron)
    ended = forked_ranks.train(tmp_path, settings, processes=processes)
    assert ended.statuses == [0] * processes, ended
    check(tmp_path / "run")
    servers = {sample["origin"]["server"] for sample in samples_of(tmp_path / "run")}
    assert len(servers) == 2
    assert len(list((tmp_path / "run" / "eval").glob("*.json"))) == 2


@pytest.mark.parametrize("do", SERVER_ENDS)
@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("/inference/v1/generate", 9),
        ("/start_weight_update", 2),
        ("/update_weights", 4),
        ("/finish_weight_update", 2),
        ("/reset_prefix_cache", 2),
    ],
)
def test_a_server_fails(path, count, do, model, tmp_path):
    """The run ends as if nothing had happened. The server was started again with the weights of that moment."""
    settings = write_settings(tmp_path, model, fault={"path": path, "count": count, "do": do})
    ended = forked_ranks.train(tmp_path, settings)
    assert ended.statuses == [0, 0], ended
    assert (tmp_path / "marker").exists()
    check(tmp_path / "run")
    notes = [json.loads(line) for line in ended.out[0].splitlines()]
    (note,) = [note["message"] for note in notes if "is started again" in note.get("message", "")]
    assert note.startswith("vLLM server ")
