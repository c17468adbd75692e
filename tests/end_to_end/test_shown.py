"""Runs in which grades choose what is trained on, and in which the teacher sees another text than the solution."""

import json
from pathlib import Path

import pytest

from megatron_paint.cli.main import main
from megatron_paint.config.load import load_settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from tests.support import forked_ranks, tiny
from tests.support.exports import same, weights, weights_of_step
from tests.support.marks import long_if_in
from tests.support.results import SAMPLER, metrics

ROOT = Path(__file__).parents[2]
PAINT = ROOT / "examples" / "quickstart" / "paint.yaml"  # its model solves about half of its problems
LAYOUT = ("megatron.pipeline_model_parallel_size=1", "megatron.tensor_model_parallel_size=1")
LAYOUT += ("megatron.sequence_parallel=false",)
SHORT = (
    *(
        "data.problems_per_step=4",
        "evaluation.problems=null",
        "run.tensorboard=false",
        "run.save_every=1",
        "run.export_every=1",
    ),
    *("evaluation.grading_seconds=60", "rollout.samples_per_problem=4", "run.seed=2"),
)
TOKEN_VALUES = ("divergence", "student_entropy", "teacher_entropy", "logprob_gap")
OASIS = ("rollout.keep=shortest_correct", "objective.reveal.solution=peer_rollout")


def train(tmp_path, run_dir, *arguments, processes=2, layout=LAYOUT):
    ended = forked_ranks.train(tmp_path, PAINT, f"run.dir={run_dir}", *SHORT, *layout, *arguments, processes=processes)
    assert ended.statuses == [0] * processes, ended
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def samples_of(run_dir, step):
    return [json.loads(line) for line in (run_dir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Three steps on two replicas: few responses are kept, unequally many on each."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder / "run", train(folder, folder / "run", "run.steps=3", *OASIS)


def test_what_a_run_logs(unbroken):
    run_dir, lines = unbroken
    for step, line in enumerate(lines, start=1):
        samples = samples_of(run_dir, step)
        assert [sample["sample"] for sample in samples] == list(range(4)) * 4
        right = {sample["id"] for sample in samples if sample["correct"]}
        kept = [sample for sample in samples if "left_out" not in sample]
        assert line["rollout/kept"] == len(kept) == len({sample["id"] for sample in kept})
        assert line["rollout/problems_without_correct"] == 4 - len(right)
        assert line["reveal/without_peer"] == sum(sample.get("left_out") == "no_peer" for sample in samples)
        assert line["rollout/kept"] + line["reveal/without_peer"] == len(right)
        assert line["reward/mean"] == sum(sample["correct"] for sample in samples) / 16
        assert line["loss_tokens"] == sum(len(sample["response_ids"]) for sample in kept)
        assert line["num_tokens"] == sum(len(sample["response_ids"]) for sample in samples)
        for sample in kept:
            group = [other for other in samples if other["id"] == sample["id"] and other["correct"]]
            shortest = sorted(group, key=lambda other: (len(other["response_ids"]), other["sample"]))
            assert sample == shortest[0]
            assert sample["reveal"]["peer"] == shortest[1]["sample"]
            assert sample["reveal"]["reference_text"] == shortest[1]["response_text"].removesuffix("<|im_end|>")
            assert sample["loss"] > 0
    assert 0 < sum(line["rollout/kept"] for line in lines) < 12
    assert sum(line["reveal/without_peer"] for line in lines) > 0


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(1, LAYOUT, marks=pytest.mark.long),
        (4, LAYOUT),  # with at most 4 kept responses, some replicas have none
        (4, ("megatron.pipeline_model_parallel_size=1",)),  # tensor parallel 2 x data parallel 2
    ],
)
def test_the_layout_does_not_change_the_step(unbroken, processes, layout, tmp_path):
    """The same responses are kept, with the same peers, and the update is that of all of them."""
    run_dir, lines = unbroken
    found = train(tmp_path, tmp_path / "run", "run.steps=1", *OASIS, processes=processes, layout=layout)
    for other, sample in zip(samples_of(tmp_path / "run", 1), samples_of(run_dir, 1), strict=True):
        assert other.pop("loss") == pytest.approx(sample.pop("loss"), rel=1e-4, abs=1e-7)
        gaps = [line.pop("sampler_gap")["largest"] for line in (other, sample) if "sampler_gap" in line]
        assert max(gaps, default=0.0) < 1e-4
        for name in TOKEN_VALUES:
            assert other.pop(name, []) == pytest.approx(sample.pop(name, []), rel=1e-3, abs=1e-5), name
        assert other == sample
    for name in ("loss", "grad_norm", "overlap/mean", "reveal/mean", "rollout/kept", "reveal/without_peer"):
        assert found[0][name] == pytest.approx(lines[0][name], rel=1e-4), name
    one, other = weights_of_step(tmp_path / "run", 1), weights_of_step(run_dir, 1)
    start = weights(ROOT / "examples" / "quickstart" / "model")
    assert set(one) == set(other)
    for name in one:
        moved = float((other[name] - start[name]).norm())
        assert moved > 0, name
        assert float((one[name] - other[name]).norm()) < 5e-3 * moved, name  # Adam's first step enlarges rounding


def test_a_resumed_run_is_the_unbroken_one(unbroken, tmp_path):
    run_dir, _ = unbroken
    train(tmp_path, tmp_path / "run", "run.steps=2", *OASIS)
    train(tmp_path, tmp_path / "run", "run.steps=3", *OASIS)
    assert metrics(tmp_path / "run") == metrics(run_dir)
    assert samples_of(tmp_path / "run", 3) == samples_of(run_dir, 3)
    assert same(weights_of_step(tmp_path / "run", 3), weights_of_step(run_dir, 3))


def test_replayed_rollouts_give_the_same_run(unbroken, tmp_path):
    """The samples of a run folder hold the responses that are left out, too."""
    run_dir, _ = unbroken
    replay = ("rollout.engine=replay", f"rollout.path={run_dir / 'samples'}")
    train(tmp_path, tmp_path / "run", "run.steps=3", *OASIS, *replay)
    assert metrics(tmp_path / "run", without=SAMPLER) == metrics(run_dir, without=SAMPLER)
    assert same(weights_of_step(tmp_path / "run", 3), weights_of_step(run_dir, 3))


def test_several_responses_without_grades_and_with_grades_that_decide_nothing(unbroken, tmp_path):
    plain, graded = tmp_path / "plain", tmp_path / "graded"
    (line,) = train(tmp_path, plain, "run.steps=1", "rollout.grade=false")
    assert line["loss_tokens"] == line["num_tokens"]
    assert not {"reward/mean", "rollout/kept", "time/grade_s"} & set(line)
    responses = [sample["response_ids"] for sample in samples_of(plain, 1)]
    assert responses == [sample["response_ids"] for sample in samples_of(unbroken[0], 1)]

    (known,) = train(tmp_path, graded, "run.steps=1", "rollout.grade=true")
    verdicts = [sample["correct"] for sample in samples_of(graded, 1)]
    assert known["reward/mean"] == sum(verdicts) / len(verdicts)
    assert 0 < known["reward/mean"] < 1
    assert (known["loss"], known["grad_norm"]) == (line["loss"], line["grad_norm"])
    assert same(weights_of_step(graded, 1), weights_of_step(plain, 1))


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_steps_without_a_right_response_leave_the_model_alone(sharded, tmp_path):
    """No answer fits into one token: no update, a checkpoint all the same, from which the run resumes."""
    run_dir, layout = tmp_path / "run", f"megatron.use_distributed_optimizer={sharded}"
    given = ("rollout.keep=correct", "rollout.max_new_tokens=1", layout, "optimizer.weight_decay=0.1")
    train(tmp_path, run_dir, "run.steps=1", *given)
    for line in train(tmp_path, run_dir, "run.steps=2", *given):
        assert (line["rollout/kept"], line["rollout/problems_without_correct"], line["loss"]) == (0, 4, 0)
        assert line["grad_norm"] is line["overlap/mean"] is None
    assert same(weights_of_step(run_dir, 2), weights(ROOT / "examples" / "quickstart" / "model"))
    first, second = (run_dir / "logs" / "console.log").read_text().split("\n==== ")[1:]
    assert "warning: in the only step no response was trained on" in first
    assert "warning: in all 2 steps no response was trained on" in second


COMBINATIONS = {
    "a limit on what is hidden of a peer": (*OASIS, "objective.reveal.hidden_nats=0.01", "rollout.keep=correct"),
    "a partner that sees the complete peer": (*OASIS, "objective.loss.partner=full_teacher", "rollout.keep=all"),
    "the support of the initial weights": ("rollout.keep=correct", "objective.loss.support=initial"),
    "a moving average": (*OASIS, "objective.teacher.weights=ema"),
    "adapters": ("rollout.keep=shortest_correct", "model.lora={rank: 4, alpha: 8}"),
}


LONG = ("a partner that sees the complete peer", "a moving average", "the support of the initial weights")
MARKED = long_if_in(LONG, COMBINATIONS)


@pytest.mark.parametrize("name", MARKED)
def test_combinations(name, tmp_path):
    """A step on two replicas changes the weights, and every kept response has a loss."""
    (line,) = train(tmp_path, tmp_path / "run", "run.steps=1", *COMBINATIONS[name])
    assert line["loss"] > 0
    assert line["grad_norm"] > 0
    samples = samples_of(tmp_path / "run", 1)
    kept = [sample for sample in samples if "left_out" not in sample]
    assert all((sample["loss"] > 0) == (sample in kept) for sample in samples)
    assert len(kept) == line.get("rollout/kept", 16)
    if "hidden" in name:
        assert all("hidden_nats" in s["reveal"] for s in kept if s["reveal"]["share"] < 1)
        assert any("hidden_nats" in s["reveal"] for s in kept)


@pytest.mark.parametrize("name", ["other_example", "shortest_correct", "peer_rollout"])
def test_the_controls_of_the_testbed(name, tmp_path):
    """One step of each. The model knows every token of what its teacher is shown."""
    control = ROOT / "examples" / "testbed" / "controls" / f"{name}.yaml"
    given = (f"run.dir={tmp_path / 'run'}", "run.steps=1", "evaluation.problems=null", "evaluation.grading_seconds=60")
    ended = forked_ranks.train(tmp_path, control, *given, processes=1)
    assert ended.statuses == [0], ended
    samples, unknown = samples_of(tmp_path / "run", 1), 3
    shown = [sample for sample in samples if sample["teacher_prompt_ids"] is not None]
    assert len(samples) == 32
    assert len(shown) == (32 if name == "other_example" else len({sample["id"] for sample in shown}))
    assert shown
    for sample in shown:
        assert unknown not in sample["teacher_prompt_ids"]
        assert sample["reveal"].get("solution", "own") == ("own" if name == "shortest_correct" else name)
        assert sample["loss"] > 0


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of a tiny model with a thinking mode, and problems with a further view."""
    folder = tmp_path_factory.mktemp("small")
    problems = tiny.make_problems(folder / "problems.jsonl")
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    problems.write_text("".join(json.dumps(row | {"gist": f"Add them, for {row['id']}."}) + "\n" for row in rows))
    return tiny.make_settings(folder, tiny.make_model(folder / "model"), problems)


def shown_in(small, tmp_path, *overrides):
    """(samples of the first step, all prompts of the run) of a run of two steps on one rank."""
    given = ("run.steps=2", "run.save_every=0", "evaluation.problems=null", f"run.dir={tmp_path / 'run'}", *overrides)
    ended = forked_ranks.train(tmp_path, small, *given, processes=1)
    assert ended.statuses == [0], ended
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] > 0
    settings = load_settings(small, given)
    return samples_of(tmp_path / "run", 1), Prompts(settings.prompts, load_tokenizer(settings.model.hf_path))


def test_the_reference_free_baseline(small, tmp_path):
    """The teacher sees the student's message and may think, and only that differs."""
    given = ("objective={name: opsd, reveal: {solution: reference_free}}", "prompts.teacher_thinking=true")
    samples, prompts = shown_in(small, tmp_path, *given)
    for sample in samples:
        texts = [prompts.tokenizer.decode(sample[f"{who}_prompt_ids"], True) for who in ("student", "teacher")]
        assert texts[0] == texts[1] + "<think>\n\n</think>\n\n"
        assert (sample["reveal"]["solution"], sample["reveal"]["shown_text"]) == ("reference_free", "")


def test_a_worked_example(small, tmp_path, capsys):
    given = ("objective={reveal: {rule: full, solution: other_example}}",)
    samples, prompts = shown_in(small, tmp_path, *given)
    shown = {sample["id"]: sample["reveal"]["of"] for sample in samples}
    assert sorted(shown) == sorted(shown.values())
    assert all(name != other for name, other in shown.items())
    rows = {row["id"]: row for row in map(json.loads, (small.parent / "problems.jsonl").read_text().splitlines())}
    for sample in samples:
        text, other = prompts.tokenizer.decode(sample["teacher_prompt_ids"], True), rows[sample["reveal"]["of"]]
        assert text.index(other["problem"]) < text.index(other["solution"]) < text.index(rows[sample["id"]]["problem"])
        assert rows[sample["id"]]["solution"] not in text
    assert main(["inspect", "samples", str(tmp_path / "run"), "1"]) == 0
    assert f"== Worked example, problem {samples[0]['reveal']['of']}: " in capsys.readouterr().out


@pytest.mark.parametrize("view", ["gist", "answer"])
def test_a_view(view, small, tmp_path):
    columns = ("data.columns.views.gist=gist", "data.columns.solution=none_has_it")
    if view == "answer":
        columns = ()
    samples, _ = shown_in(small, tmp_path, *columns[:1], f"objective.reveal.view={view}", "objective.reveal.rule=full")
    for sample in samples:
        number = int(sample["id"][1:])
        expected = {"gist": f"Add them, for {sample['id']}.", "answer": f"\\boxed{{{2 * number + 8}}}"}[view]
        assert (sample["reveal"]["view"], sample["reveal"]["shown_text"]) == (view, expected)


MISTAKES = {
    "an example without another problem": (
        ("data.problems_per_step=1", "objective={reveal: {rule: full, solution: other_example}}"),
        "solution=other_example takes another problem of the same step, and data.problems_per_step is 1",
    ),
    "an example that does not fit": (
        ("rollout.max_new_tokens=500", "objective={reveal: {rule: full, solution: other_example}}"),
        "solution=other_example can make a prompt of",
    ),
    "a response that does not fit twice": (
        ("rollout.max_new_tokens=300", "rollout.samples_per_problem=2", "objective.reveal.solution=peer_rollout"),
        "without the response that it shows, and the model has 1024 positions; set rollout.max_new_tokens to at most",
    ),
    "a view without a column": (
        ("data.columns.views.gist=gits", "objective.reveal.view=gist"),
        "data.columns.views.gist: no row of",
    ),
    "a view that is not named": (("objective.reveal.view=gist",), "objective.reveal.view=gist is no view"),
    "a replay without the other responses": (
        ("rollout.samples_per_problem=2", "rollout.engine=replay", "rollout.path={run}/samples"),
        "has no rollout for step 1, problem",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_refused_before_a_run(mistake, small, trained, tmp_path, capsys):
    overrides, says = MISTAKES[mistake]
    overrides = [override.replace("{run}", str(trained.run)) for override in overrides]
    given = [f"run.dir={tmp_path / 'run'}", "evaluation.problems=null", *overrides]
    assert main(["train", str(small), *given, "--processes", "1", "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1, printed
    assert says in printed
