"""Runs that end at any moment and resume: what was due is done, nothing twice, with the weights of an unbroken run."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_paint.__main__ import run
from megatron_paint.mcore import batch
from megatron_paint.run.lock_watch import LOCK
from tests.support import forked_ranks, tiny
from tests.support.exports import same, weights_of_step
from tests.support.results import check_complete, events, last_event, metrics

KILLS = 6


def test_killed_before_the_last_export(trained, tmp_path):
    """Only the checkpoint of the last step exists. The rest is made, and the table is that of the unbroken run."""
    run = tmp_path / "run"
    missing = ("eval", "hf")
    ignored = shutil.ignore_patterns("tensorboard")
    shutil.copytree(
        trained.run,
        run,
        ignore=lambda at, names: {
            *ignored(at, names),
            *(name for name in names if Path(at).name in missing and name.startswith("step_000004")),
        },
    )
    first = (run / "eval" / "step_000000.json").stat().st_mtime_ns
    ended = forked_ranks.train(tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto")
    assert ended.statuses == [0, 0], ended
    assert events(ended, "step", "evaluation") == [("evaluation", 4)]
    assert last_event(ended) == last_event(trained.ended)
    assert (run / "eval" / "step_000000.json").stat().st_mtime_ns == first
    name = "eval/step_000004.json"
    assert (run / name).read_bytes() == (trained.run / name).read_bytes()
    assert same(weights_of_step(run, 4), weights_of_step(trained.run, 4))
    again = forked_ranks.train(tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto")
    assert events(again, "step", "evaluation") == []
    assert last_event(again) == last_event(trained.ended)


def test_killed_between_a_checkpoint_and_its_export(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run, ignore=shutil.ignore_patterns("step_000004*", "step_000002.json"))
    shutil.copytree(trained.run / "checkpoints/step_000002", run / "checkpoints/.step_000004.unfinished")
    ended = forked_ranks.train(tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto", "run.export_every=2")
    assert ended.statuses == [0, 0], ended
    told = events(ended, "step", "evaluation")
    assert told == [("evaluation", 2), ("step", 3), ("step", 4), ("evaluation", 4)]
    assert {path.name for path in (run / "hf").iterdir()} == {"step_000002", "step_000004"}
    assert same(weights_of_step(run, 4), weights_of_step(trained.run, 4))
    assert not same(weights_of_step(run, 2), weights_of_step(run, 4))
    assert metrics(run) == metrics(trained.run)
    assert last_event(ended) == last_event(trained.ended)


def test_killed_at_any_moment(trained, tmp_path):
    steps = 8
    arguments = (f"run.steps={steps}", "run.save_every=1", "run.export_every=2", "evaluation.problems=null")
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    assert forked_ranks.train(tmp_path, trained.settings, f"run.dir={unbroken}", *arguments).statuses == [0, 0]
    draw = random.Random(2)
    for _ in range(KILLS):
        # A step with its checkpoint opens and renames about 40 times; the delay lands inside writes that nobody sees.
        kill = forked_ranks.Kill(run, event=draw.randrange(1, 90), delay=draw.choice((0.0, 0.001, 0.004)))
        ended = forked_ranks.train(
            tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto", *arguments, kill=kill
        )
        assert ended.statuses == [-9, -9], ended
        check_complete(run)
    ended = forked_ranks.train(tmp_path, trained.settings, f"run.dir={run}", "run.resume=auto", *arguments)
    assert ended.statuses == [0, 0], ended
    assert metrics(run) == metrics(unbroken)
    for step in range(2, steps + 1, 2):
        assert same(weights_of_step(run, step), weights_of_step(unbroken, step)), step
    names = [sorted(str(path.relative_to(place)) for path in place.rglob("*")) for place in (run, unbroken)]
    # A process killed while it takes the lock leaves a file, which a start two minutes later removes.
    ours = [[n for n in found if "events.out" not in n and not n.startswith(f".{LOCK}.")] for found in names]
    assert ours[0] == ours[1]
    assert not any("unfinished" in name or "replaced" in name for name in names[0])


def test_a_checkpoint_says_what_it_is_of(trained, tmp_path):
    """It holds the settings and the model's sizes, and another model with the same name cannot resume it."""
    state = json.loads((trained.run / "checkpoints/step_000004/run_state.json").read_text())
    assert state["step"] == 4
    assert state["settings"]["run"]["dir"] == str(trained.run)
    assert state["settings"]["optimizer"]["lr"] == 1e-3
    assert (state["model"]["hidden_size"], state["model"]["tie_word_embeddings"]) == (32, True)
    for name in ("run", "problems.jsonl"):
        (shutil.copytree if name == "run" else shutil.copy)(trained.folder / name, tmp_path / name)
    model = tiny.make_model(tmp_path / "model", tied=False)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained.folder / "model"), str(model)))
    arguments = (f"model.hf_path={model}", f"run.dir={tmp_path / 'run'}", "run.resume=auto")
    message = forked_ranks.train(tmp_path, trained.settings, *arguments).message
    assert "step_000004 is of another model than model.hf_path: tie_word_embeddings is True, not False" in message


def test_self_check_leaves_a_used_run_folder_alone(trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")}
    ended = forked_ranks.run(tmp_path, "train", trained.settings, "--self-check", "--quiet")
    assert ended.statuses == [0, 0], ended
    found = re.fullmatch(
        r"self-check: loss of the model against itself (\S+) nats a token \(limit 0\.05\); "
        r"sampler and trainer differ by (\S+) nats at most \(limit 1\)\n",
        ended.out[0],
    )
    assert float(found[1]) < 1e-8
    assert float(found[2]) < 1e-4
    assert {path: path.stat().st_mtime_ns for path in trained.run.rglob("*")} == before


def with_a_wrong_offset() -> None:
    """The command line, in which the rows that predict a response are one row too early."""
    right = batch._pack

    def shifted(*arguments, **options):
        packed = right(*arguments, **options)
        return replace(packed, predicting_N=packed.predicting_N - 1)

    batch._pack = shifted
    run()


def test_self_check_reports_the_noise_of_fp8(trained, tmp_path):
    """On two tensor-parallel ranks. Without FP8 it has no such line."""
    fp8 = ("megatron.fp8=hybrid", "megatron.fp8_recipe=tensorwise", "megatron.fp8_emulate=true", "model.dtype=bfloat16")
    ended = forked_ranks.run(tmp_path, "train", trained.settings, *fp8, "--self-check", "--quiet")
    assert ended.statuses == [0, 0], ended
    match = re.search(
        r"self-check: cosine (\S+) between the gradients with FP8 \(tensorwise\) and without", ended.out[0]
    )
    assert 0.5 < float(match[1]) < 0.99  # a tiny model is noisy
    assert ended.out[1] == ""


def test_self_check_sees_a_wrong_offset(trained, tmp_path):
    """Both passes of the loss have it, so the loss stays at rounding; the sampler has not."""
    arguments = ("train", trained.settings, "--self-check", "run.sampler_gap_limit=0.01", "--processes", "1")
    arguments += ("megatron.tensor_model_parallel_size=1", "megatron.sequence_parallel=false")
    target = "tests.end_to_end.test_resume:with_a_wrong_offset"
    ended = forked_ranks.start_command(tmp_path, *arguments, target=target).wait()
    assert ended.statuses == [2], ended
    assert "self-check: sampler and trainer differ by " in ended.err[0]
