"""Whole runs through the command line: kill and resume, replay, what a run folder holds, a Hugging Face folder out."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megatron_paint.cli.main import main
from megatron_paint.objectives.metric_table import METRICS as DESCRIBED
from megatron_paint.run.lock_watch import LOCK, read_lock
from tests.support import forked_ranks, tiny
from tests.support.exports import same, weights_of_step
from tests.support.processes import left_of_session
from tests.support.results import SAMPLER, metrics

METRICS = {
    *("step", "loss", "num_tokens", "loss_tokens", "grad_norm", "lr", "tokens_per_second"),
    *("sampler_gap/max", "sampler_gap/mean", "sampler_gap/above_share"),
    *("overlap/mean", "reveal/mean", "anchors/none_share", "entropy/student_mean", "entropy/teacher_mean"),
    *("selected/share", "divergence/selected_mean", "divergence/other_mean", "clip/share", "clip/entries"),
    *(
        "response/length_mean",
        "response/truncated_share",
        "response/no_answer_share",
        "time/rollout_s",
        "time/mask_s",
        "time/teacher_s",
    ),
    *("time/student_s", "time/optimizer_s", "memory/host_gb"),
}


def run(folder, settings, *arguments):
    """The command as a user gives it, whose launcher starts two ranks."""
    ended = forked_ranks.start_command(folder, "train", settings, *arguments, "--processes", "2").wait()
    assert ended.statuses == [0], ended
    return ended


def test_a_support_is_measured(trained, tmp_path):
    run_dir = tmp_path / "support"
    options = ("objective.loss.support=initial", "objective.loss.support_ratio=0.3", "run.steps=2")
    ended = forked_ranks.train(tmp_path, trained.settings, f"run.dir={run_dir}", *options)
    assert ended.statuses == [0, 0], ended
    for step in metrics(run_dir):
        assert {"support/outside_mass", "support/size"} == {key for key in step if key.startswith("support/")}
        lines = (run_dir / "samples" / f"step_{step['step']:06d}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        for key, name in (("support/outside_mass", "outside_mass"), ("support/size", "support_size")):
            values = [value for sample in samples for value in sample[name]]
            assert len(values) == step["num_tokens"]
            assert sum(values) / len(values) == pytest.approx(step[key], abs=1e-5)
        assert 0 < step["support/outside_mass"] < 1
        assert step["support/size"] >= 1


def test_run_folder(trained):
    run_dir = trained.run
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(set(line) == METRICS for line in lines)
    assert set(DESCRIBED) >= METRICS
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
    events = [json.loads(line) for line in trained.ended.out[0].splitlines()]
    assert [e["event"] for e in events].count("step") == 4
    assert events[-1]["event"] == "end"
    notes = [event["message"].split(":")[0] for event in events if event["event"] == "note"]
    starts = [note.split()[0] for note in notes]
    plan = ["model", "layout", "layers", "loss", "step", "memory", "sampling", "for", "host"]
    assert starts[:11] == [*plan, "data", "starting"]
    assert not {"model", "layout", "memory", "data"} & set(starts[11:]), "ranks print the plan again"
    assert notes[10] == "starting 2 ranks"


def test_a_finished_run_prints_its_results_again_without_ranks(trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")}
    again = run(tmp_path, trained.settings, "run.resume=auto", "--json").out[0].splitlines()
    assert json.loads(again[-1]) == json.loads(trained.ended.out[0].splitlines()[-1])
    assert not any("starting" in line for line in again)
    assert {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")} == before


def test_weights_changed_and_load(trained):
    out = trained.run / "hf" / "step_000004"
    model = Qwen3ForCausalLM.from_pretrained(out)
    start = Qwen3ForCausalLM.from_pretrained(trained.folder / "model")
    for (name, new), old in zip(model.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(new, old), name
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT


def test_the_export_has_a_model_card(trained):
    card = ModelCard.load(trained.run / "hf" / "step_000004" / "README.md")
    assert "base_model" not in card.data.to_dict()  # a local folder without a name on the hub
    assert "* Base: a local folder with the name `model`." in card.text
    assert card.data.library_name == "transformers"
    assert "# model, PAINT, step 4\n" in card.text
    assert str(trained.folder) not in card.content


def test_killed_run_goes_on_bit_for_bit(trained, tmp_path):
    arguments = (f"run.dir={tmp_path / 'run'}", "run.resume=auto")
    launcher = forked_ranks.start_command(tmp_path, "train", trained.settings, *arguments, "--processes", "2")
    marker = tmp_path / "run" / "checkpoints" / "step_000002" / "complete"
    deadline = time.monotonic() + 200
    while not marker.exists():
        assert launcher.is_alive, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert not left_of_session(launcher.pid)
    assert read_lock(tmp_path / "run" / LOCK).pid == launcher.pid
    # The kill may come after the next save on a busy machine.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004", ignore_errors=True)
    again = run(tmp_path, trained.settings, *arguments)
    taken = f"took over the lock of {tmp_path / 'run'} from process {launcher.pid} on "
    assert taken in again.out[0]
    assert not (tmp_path / "run" / LOCK).exists()
    log = (tmp_path / "run" / "logs" / "console.log").read_text()
    assert log.count("\n==== ") == 2
    assert log.index("step 1/4") < log.index(taken) < log.index("resumed at step 2") < log.index("Look next:")
    assert metrics(tmp_path / "run") == metrics(trained.run)
    for step in (1, 2, 3, 4):
        name = f"samples/step_{step:06d}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (trained.run / name).read_bytes()
    assert same(weights_of_step(tmp_path / "run", 4), weights_of_step(trained.run, 4))


def test_replay_repeats_the_run(trained, tmp_path):
    """The samples of a run folder, replayed as they stand, give its metrics again; so do rollouts without `finished`,
    whose end is found by their last token."""
    unbroken = trained.run
    bare = tmp_path / "rollouts.jsonl"
    with bare.open("w") as file:
        for step in (1, 2, 3, 4):
            for line in (unbroken / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines():
                sample = json.loads(line)
                record = {"id": sample["id"], "step": step, "sample": 0, "response_ids": sample["response_ids"]}
                file.write(json.dumps(record) + "\n")
    wanted = metrics(unbroken, without=SAMPLER)
    assert 0 < min(line["response/truncated_share"] for line in wanted) < 1, "some responses end by themselves"
    for name, path in (("folder", unbroken / "samples"), ("file", bare)):
        replay = ("rollout.engine=replay", f"rollout.path={path}", "evaluation.problems=null")
        ended = forked_ranks.train(tmp_path, trained.settings, f"run.dir={tmp_path / name}", *replay)
        assert ended.statuses == [0, 0], ended
        assert metrics(tmp_path / name, without=SAMPLER) == wanted


def test_the_evaluate_command_gives_the_run_s_own_evaluation(trained, tmp_path):
    ended = forked_ranks.run(tmp_path, "evaluate", trained.settings, "--out", tmp_path / "out")
    assert ended.statuses == [0, 0], ended
    report = (tmp_path / "out" / "problems.json").read_bytes()
    assert report == (trained.run / "eval" / "step_000000.json").read_bytes()


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_is_evaluated_as_its_run_did(lora, trained, tmp_path):
    """At another layout, and for LoRA with the adapters as they stand beside the weights."""
    run_dir = trained.run
    if lora:
        run_dir = tmp_path / "lora"
        ended = forked_ranks.train(
            tmp_path, trained.settings, f"run.dir={run_dir}", "model.lora={rank: 4, alpha: 8}", "run.steps=2"
        )
        assert ended.statuses == [0, 0], ended
    ended = forked_ranks.start_command(
        tmp_path,
        *("evaluate", "--model", run_dir / "checkpoints" / "step_000002"),
        *("--benchmarks", trained.folder / "problems.jsonl", "--n", "2", "--out", tmp_path / "out"),
        *("--processes", "1", "evaluation.limit=3", "evaluation.max_new_tokens=8", "evaluation.thinking=false"),
        *("evaluation.greedy=true", "rollout.batch_size=2"),
    ).wait()
    assert ended.statuses == [0], ended
    found, wanted = (
        json.loads(path.read_text()) for path in (tmp_path / "out/problems.json", run_dir / "eval/step_000002.json")
    )
    assert found["answers"] == wanted["answers"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["problems"]["avg"] == wanted["metrics"]["avg"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"summary.md", "summary.png"}


def test_a_killed_evaluation_goes_on(trained, tmp_path):
    """Answers that are there are not sampled again, and the report is that of an unbroken evaluation."""
    out = tmp_path / "out"
    line = ("evaluate", trained.settings, "--out", out, "rollout.batch_size=1", "evaluation.samples=2")
    launcher = forked_ranks.start_command(tmp_path, *line, "--processes", "2")
    answers, deadline = out / "problems.answers.jsonl", time.monotonic() + 200
    while not answers.exists() or answers.read_text().count("\n") < 3:
        assert launcher.is_alive, "the evaluation ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert not left_of_session(launcher.pid)
    there = answers.read_text().split("\n")
    answers.write_text("\n".join(there[:3]) + "\n" + there[2][:20])  # the header, two answers, and one cut short
    ended = forked_ranks.run(tmp_path, *line, "--json")
    assert ended.statuses == [0, 0], ended
    assert "2 answers exist already" in ended.out[0]
    assert answers.read_text().split("\n")[:3] == there[:3]
    assert (out / "problems.json").read_bytes() == (trained.run / "eval" / "step_000000.json").read_bytes()
    ended = forked_ranks.run(tmp_path, *line, "evaluation.temperature=0.5", "evaluation.thinking=true")
    assert re.search(r"temperature was 1.0 and is 0.5, template was .* and is .*, thinking was False", ended.message)


def test_changed_settings_do_not_resume(trained, capsys):
    before = (trained.run / "metrics.jsonl").read_bytes()
    status = main(["train", str(trained.settings), "optimizer.lr=2e-3", "run.resume=auto", "--processes", "2"])
    assert status == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert (trained.run / "metrics.jsonl").read_bytes() == before


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tied": False}, "tie_word_embeddings is True, not False"),  # a separate output layer
        ({"rope_parameters": YARN}, "yarn is None, not {'factor': 4.0"),  # no weight shows it
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta is 10000.0, not 1000000.0"),
    ],
)
def test_another_model_does_not_resume(change, message, trained, tmp_path):
    """The run's folder with a model that its checkpoint does not fit. Two ranks print one error."""
    shutil.copytree(trained.run, tmp_path / "run")
    tiny.make_model(tmp_path / "model", **change)
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(
        recorded.replace(str(trained.folder / "model"), str(tmp_path / "model"))
    )
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.suffix == ".distcp"}
    arguments = (f"model.hf_path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}", "run.resume=auto", "run.steps=6")
    command = ("train", trained.settings, *arguments, "--processes", "2")
    ended = forked_ranks.start_command(tmp_path, *command).wait()
    assert ended.statuses == [2], ended
    # A CUDA build of torch prints that it found no GPU when Megatron asks it.
    (line,) = (line for line in ended.err[0].splitlines() if "No CUDA runtime is found" not in line)
    assert line.startswith("megatron-paint: error: checkpoint ")
    assert "is of another model" in line
    assert message in line
    assert before
    assert {path: path.read_bytes() for path in before} == before


def test_a_learning_rate_changes_on_purpose(trained, tmp_path):
    """The steps after the checkpoint have the new one, and the record of the run says since when."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained.run, run_dir, ignore=shutil.ignore_patterns("step_000004*", "tensorboard"))
    changed = (f"run.dir={run_dir}", "run.resume=auto", "optimizer.lr=2e-3", "run.allow_changes=[optimizer.lr]")
    ended = forked_ranks.train(tmp_path, trained.settings, *changed, "evaluation.problems=null")
    assert ended.statuses == [2, 2], ended  # the evaluation is another one, and is not named
    ended = forked_ranks.train(tmp_path, trained.settings, *changed)
    assert ended.statuses == [0, 0], ended
    assert [line["lr"] for line in metrics(run_dir)] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert "changed after step 2, as run.allow_changes lets it: optimizer.lr: 0.001 -> 0.002" in ended.out[0]
    record = json.loads((run_dir / "changes.jsonl").read_text())
    assert (record["after_step"], record["setting"], record["new"]) == (2, "optimizer.lr", 2e-3)
    assert metrics(run_dir)[:2] == metrics(trained.run)[:2]
    assert not same(weights_of_step(run_dir, 4), weights_of_step(trained.run, 4))


def test_the_order_of_the_problems_changes_on_purpose(trained, tmp_path):
    """The checkpoint is of a version without this setting. The new order begins without visits, and prints this."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained.run, run_dir, ignore=shutil.ignore_patterns("step_000004*", "tensorboard"))
    config = run_dir / "config.yaml"
    old = config.read_text().replace("  order: shuffled\n", "")
    assert old != config.read_text()
    config.write_text(old)
    adastar = (f"run.dir={run_dir}", "run.resume=auto", "data.order=adastar")
    message = forked_ranks.train(tmp_path, trained.settings, *adastar).message
    assert "data.order: 'shuffled' -> 'adastar'" in message
    ended = forked_ranks.train(tmp_path, trained.settings, *adastar, "run.allow_changes=[data.order]")
    assert ended.statuses == [0, 0], ended
    assert "data.order=adastar begins without visits, because the checkpoint has none" in ended.out[0]
    assert "changed after step 2, as run.allow_changes lets it: data.order: 'shuffled' -> 'adastar'" in ended.out[0]
    assert [line.get("order/promoted") for line in metrics(run_dir)] == [None, None, 1, 1]  # it solves nothing
    state = json.loads((run_dir / "checkpoints" / "step_000004" / "run_state.json").read_text())
    assert sorted(visit for visit in state["order"]["visits"].values()) == [[3, 0, 1], [4, 0, 1]]
    assert "order" not in json.loads((trained.run / "checkpoints" / "step_000004" / "run_state.json").read_text())
