"""Whole runs through the command line: kill and resume, replay, what a run folder holds, a Hugging Face folder out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from tests.support import forked_ranks, tiny

ROOT = Path(__file__).parents[2]
LAYOUT = "tensor_model_parallel_size: 2, sequence_parallel: true"
METRICS = {
    *("step", "loss", "num_tokens", "loss_tokens", "grad_norm", "lr", "tokens_per_second", "sampler_gap/max"),
    *("overlap/mean", "reveal/mean", "anchors/none_share", "entropy/student_mean", "entropy/teacher_mean"),
    *("selected/share", "divergence/selected_mean", "divergence/other_mean", "clip/share", "clip/entries"),
    *("response/length_mean", "response/truncated_share", "time/rollout_s", "time/mask_s", "time/teacher_s"),
    *("time/student_s", "time/optimizer_s"),
}


def command(settings, *arguments):
    return [sys.executable, "-m", "megatron_paint", "train", str(settings), *arguments, "--processes", "2"]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(settings, *arguments):
    done = subprocess.run(
        command(settings, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder with settings, model and problems; run folder of four unbroken steps; its console)."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.make_model(folder / "model")
    tiny.make_problems(folder / "problems.jsonl")
    settings = tiny.make_settings(folder, folder / "model", folder / "problems.jsonl", layout=LAYOUT)
    return folder, folder / "run", run(settings, "--json")


def metrics(run_dir, *, timeless=True, without=()):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if not timeless:
        return lines
    left_out = {"tokens_per_second", *without}
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k not in left_out} for line in lines]


def weights(run_dir):
    return load_file(run_dir / "hf" / "step_000004" / "model.safetensors")


def test_run_folder(whole):
    _, run_dir, console = whole
    lines = metrics(run_dir, timeless=False)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(set(line) == METRICS for line in lines)
    assert all(line["sampler_gap/max"] < 1e-4 for line in lines)
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"step_000002", "step_000004"}
    assert {p.name for p in (run_dir / "eval").iterdir()} == {f"step_00000{i}.json" for i in (0, 2, 4)}
    samples = [json.loads(line) for line in (run_dir / "samples" / "step_000003.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for sample in samples:
        assert set(sample) >= {
            "id",
            "step",
            "sample",
            "finished",
            "student_prompt_ids",
            "teacher_prompt_ids",
            "response_ids",
            "response_text",
        }
        assert set(sample) >= {"overlap", "anchors", "reveal", "loss", "selected"}
        assert len(sample["selected"]) == -(-len(sample["response_ids"]) // 5)  # a fifth, rounded up
    events = [json.loads(line) for line in console.splitlines()]
    assert [e["event"] for e in events].count("step") == 4
    assert events[-1]["event"] == "end"
    notes = [event["message"].split(":")[0] for event in events if event["event"] == "note"]
    starts = [note.split()[0] for note in notes]
    assert starts[:8] == ["model", "layout", "layers", "loss", "step", "memory", "data", "starting"]
    assert not {"model", "layout", "memory", "data"} & set(starts[8:]), "ranks print the plan again"
    assert notes[7] == "starting 2 ranks"


def test_a_finished_run_prints_its_results_again_without_ranks(whole):
    _, run_dir, console = whole
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    again = run(run_dir.parent / "settings.yaml", "run.resume=auto", "--json").splitlines()
    assert json.loads(again[-1]) == json.loads(console.splitlines()[-1])
    assert not any("starting" in line for line in again)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_weights_changed_and_load(whole):
    folder, run_dir, _ = whole
    out = run_dir / "hf" / "step_000004"
    model = Qwen3ForCausalLM.from_pretrained(out)
    start = Qwen3ForCausalLM.from_pretrained(folder / "model")
    for (name, new), old in zip(model.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(new, old), name
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT


def test_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    folder, unbroken, _ = whole
    arguments = (f"run.dir={tmp_path / 'run'}", "run.resume=auto")
    settings = folder / "settings.yaml"
    process = subprocess.Popen(
        command(settings, *arguments), cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    marker = tmp_path / "run" / "checkpoints" / "step_000002" / "complete"
    deadline = time.monotonic() + 200
    while not marker.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The kill may come after the next save on a busy machine.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004", ignore_errors=True)
    run(settings, *arguments)
    assert metrics(tmp_path / "run") == metrics(unbroken)
    for step in (1, 2, 3, 4):
        name = f"samples/step_{step:06d}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (unbroken / name).read_bytes()
    ours, theirs = weights(tmp_path / "run"), weights(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_replay_repeats_the_run(whole, tmp_path):
    """The samples of a run folder, replayed as they stand, give its metrics again; so do rollouts without `finished`,
    whose end is found by their last token."""
    folder, unbroken, _ = whole
    bare = tmp_path / "rollouts.jsonl"
    with bare.open("w") as file:
        for step in (1, 2, 3, 4):
            for line in (unbroken / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines():
                sample = json.loads(line)
                record = {"id": sample["id"], "step": step, "sample": 0, "response_ids": sample["response_ids"]}
                file.write(json.dumps(record) + "\n")
    wanted = metrics(unbroken, without=("sampler_gap/max",))
    assert 0 < min(line["response/truncated_share"] for line in wanted) < 1, "some responses end by themselves"
    for name, path in (("folder", unbroken / "samples"), ("file", bare)):
        replay = ("rollout.engine=replay", f"rollout.path={path}", "evaluation.problems=null")
        ended = forked_ranks.train(tmp_path, folder / "settings.yaml", f"run.dir={tmp_path / name}", *replay)
        assert ended.statuses == [0, 0], ended
        assert metrics(tmp_path / name, without=("sampler_gap/max",)) == wanted


def test_the_evaluate_command_gives_the_run_s_own_evaluation(whole, tmp_path):
    folder, unbroken, _ = whole
    ended = forked_ranks.run(tmp_path, "evaluate", folder / "settings.yaml", "--out", tmp_path / "out")
    assert ended.statuses == [0, 0], ended
    report = (tmp_path / "out" / "problems.json").read_bytes()
    assert report == (unbroken / "eval" / "step_000000.json").read_bytes()


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_is_evaluated_as_its_run_did(lora, whole, tmp_path):
    """At another layout, and for LoRA with the adapters as they stand beside the weights."""
    folder, run_dir, _ = whole
    if lora:
        run_dir = tmp_path / "lora"
        ended = forked_ranks.train(
            tmp_path, folder / "settings.yaml", f"run.dir={run_dir}", "model.lora={rank: 4, alpha: 8}", "run.steps=2"
        )
        assert ended.statuses == [0, 0], ended
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_paint", "evaluate", "--model", run_dir / "checkpoints" / "step_000002"),
            *("--benchmarks", folder / "problems.jsonl", "--n", "2", "--out", tmp_path / "out", "--processes", "1"),
            *("evaluation.limit=3", "evaluation.max_new_tokens=12", "evaluation.thinking=false"),
            *("evaluation.greedy=true", "rollout.batch_size=2"),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, wanted = (
        json.loads(path.read_text()) for path in (tmp_path / "out/problems.json", run_dir / "eval/step_000002.json")
    )
    assert found["answers"] == wanted["answers"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["problems"]["avg"] == wanted["metrics"]["avg"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"summary.md", "summary.png"}


def test_a_killed_evaluation_goes_on(whole, tmp_path):
    """Answers that are there are not sampled again, and the report is that of an unbroken evaluation."""
    folder, run_dir, _ = whole
    out = tmp_path / "out"
    line = ("evaluate", folder / "settings.yaml", "--out", out, "rollout.batch_size=1", "evaluation.samples=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_paint", *map(str, line), "--processes", "2"],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    answers, deadline = out / "problems.answers.jsonl", time.monotonic() + 200
    while not answers.exists() or answers.read_text().count("\n") < 3:
        assert process.poll() is None, "the evaluation ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    there = answers.read_text().split("\n")
    answers.write_text("\n".join(there[:3]) + "\n" + there[2][:20])  # the header, two answers, and one cut short
    ended = forked_ranks.run(tmp_path, *line, "--json")
    assert ended.statuses == [0, 0], ended
    assert "2 answers exist already" in ended.out[0]
    assert answers.read_text().split("\n")[:3] == there[:3]
    assert (out / "problems.json").read_bytes() == (run_dir / "eval" / "step_000000.json").read_bytes()
    ended = forked_ranks.run(tmp_path, *line, "evaluation.temperature=0.5", "evaluation.thinking=true")
    assert re.search(r"temperature was 1.0 and is 0.5, template was .* and is .*, thinking was False", ended.message)


def test_changed_settings_do_not_resume(whole, capsys):
    from megatron_paint.cli.main import main

    folder, run_dir, _ = whole
    before = (run_dir / "metrics.jsonl").read_bytes()
    status = main(["train", str(folder / "settings.yaml"), "optimizer.lr=2e-3", "run.resume=auto", "--processes", "2"])
    assert status == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_another_model_does_not_resume(whole, tmp_path):
    """The same folder, but with an output layer of its own, which the checkpoint has not; told once by two ranks."""
    folder, run_dir, _ = whole
    shutil.copytree(run_dir, tmp_path / "run")
    tiny.make_model(tmp_path / "model", tied=False)
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(recorded.replace(str(folder / "model"), str(tmp_path / "model")))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.suffix == ".distcp"}
    arguments = (f"model.hf_path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}", "run.resume=auto", "run.steps=6")
    done = subprocess.run(
        command(folder / "settings.yaml", *arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr
    # A CUDA build of torch says that it found no GPU when Megatron asks it.
    (line,) = (line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line)
    assert line.startswith("megatron-paint: error: checkpoint ")
    assert "is of another model" in line
    assert before
    assert {path: path.read_bytes() for path in before} == before
