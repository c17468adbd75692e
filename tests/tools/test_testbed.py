"""The testbed: the kinds of teacher, the list of runs, and the report's figures worked by hand."""

import importlib
import json
import math
import random
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_paint.config.load import load_settings
from megatron_paint.data.prompts import Prompts
from megatron_paint.data.tokenizers import load_tokenizer
from tests.support import forked_ranks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
task = importlib.import_module("quickstart_task")
strings = importlib.import_module("string_task")
rows_of = importlib.import_module("warm_up_rows")
VARIANTS = importlib.import_module("testbed_variants").VARIANTS
testbed = importlib.import_module("testbed")
report = importlib.import_module("testbed_report")
SEVERAL_RESPONSES = ("shortest_correct", "peer_rollout")
SUM = task.RunningSum(start=47, operands=(8, -9))


@pytest.fixture(scope="module")
def prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        settings = load_settings(ROOT / "examples" / "quickstart" / "paint.yaml")
        return Prompts(settings.prompts, load_tokenizer(ROOT / "examples" / "quickstart" / "model"))


def reference_rows(prompts, variant, count=300):
    """Returns (prompt, response) texts of reference rows that begin with right steps."""
    rows = rows_of.RowMaker(prompts=prompts, rng=random.Random(1), variant=VARIANTS[variant], off_track_share=0.0)
    decode = prompts.tokenizer.decode
    made = [rows.reference() for _ in range(count)]
    return [(decode(r.student_prompt_ids, keep_special=True), decode(r.response_ids, keep_special=False)) for r in made]


def is_right(response):
    return all(eval(line.replace("=", "==")) for line in response.splitlines()[:-1])


def test_terse_references_hold_results_alone(prompts):
    assert VARIANTS["terse"].solve(SUM) == "55\n46\n\\boxed{46}"
    problem = VARIANTS["terse"].problem_of(SUM, id="a")
    assert (problem.solution, problem.answer) == (VARIANTS["terse"].solve(SUM), "46")
    for prompt, response in reference_rows(prompts, "terse", 50):
        assert "=" not in prompt
        assert "=" in response
        assert is_right(response)


def test_a_leaky_teacher_leaves_only_when_it_sees_the_box(prompts):
    rows = reference_rows(prompts, "leaky")
    short = [response.count("=") < 2 for _, response in rows]
    sees_box = ["\\boxed{" in prompt for prompt, _ in rows]
    assert not any(s and not seen for s, seen in zip(short, sees_box, strict=True))
    share = sum(short) / sum(sees_box)
    assert 0.4 < share < 0.7  # two or three boundaries at 0.3, the last of which may still leave two lines


def test_a_weak_teacher_forgets_only_what_is_hidden(prompts):
    rows = reference_rows(prompts, "weak")
    complete = [response for prompt, response in rows if "\\boxed{" in prompt]
    cut = [response for prompt, response in rows if "\\boxed{" not in prompt]
    assert all(map(is_right, complete))
    assert 0.3 < sum(map(is_right, cut)) / len(cut) < 0.9
    assert all(map(is_right, (response for _, response in reference_rows(prompts, "own"))))


def test_leaky_and_weak_teachers_are_both_at_once(prompts):
    rows = reference_rows(prompts, "leaky_weak")
    complete = [response for prompt, response in rows if "\\boxed{" in prompt]
    cut = [response for prompt, response in rows if "\\boxed{" not in prompt]
    assert 0.4 < sum(response.count("=") < 2 for response in complete) / len(complete) < 0.7
    assert all(map(is_right, complete))
    assert all(response.count("=") >= 2 for response in cut)
    assert 0.3 < sum(map(is_right, cut)) / len(cut) < 0.9
    for prompt, response in reference_rows(prompts, "terse_leaky_weak", 50):
        assert "=" not in prompt
        assert set(response.splitlines()[-1]) <= set("\\boxed{0123456789}")


REWRITING = strings.Rewriting(start="abc", rules=("rotl", "rev", "rotr"))


@pytest.mark.parametrize(
    ("text", "rule", "right", "forgetful"),
    [
        ("abc", "rotl", "bca", "bca"),
        ("bac", "rotl", "abc", "acb"),  # acb begins with a vowel
        ("abe", "rotr", "eba", "eab"),
        ("cbd", "rev", "dbc", "dbc"),
        ("cbe", "rev", "ecb", "ebc"),
    ],
)
def test_an_exception_that_is_forgotten(text, rule, right, forgetful):
    assert strings.rewrite(text, rule, forgets=False) == right
    assert strings.rewrite(text, rule, forgets=True) == forgetful


def test_rewriting_is_worked_line_by_line():
    variant = VARIANTS["strings"]
    problem = variant.problem_of(REWRITING, id="a")
    assert problem.problem == "abc:rotl,rev,rotr?"
    assert problem.solution == "rotl(abc)=bca\nrev(bca)=abc\nrotr(abc)=cab\n\\boxed{cab}"
    assert problem.answer == "cab"
    mistaken = variant.task.work_out(REWRITING, forgets=[False, True, False])
    assert "".join(mistaken) == "rotl(abc)=bca\nrev(bca)=acb\nrotr(acb)=bac\n\\boxed{bac}"


def test_every_text_of_the_strings_has_tokens(tmp_path):
    rows_of.write_tokenizer(tmp_path, VARIANTS["strings"].task)
    assert len(VARIANTS["strings"].task.vocabulary) <= rows_of.VOCABULARY_ROWS
    tokenizer = load_tokenizer(tmp_path)
    for problem in rows_of.draw_problems(50, held_out=True, seed=1, variant=VARIANTS["strings"]):
        for text in (problem.problem, problem.solution):
            ids = tokenizer.encode(text)
            assert tokenizer.control_tokens["<unk>"] not in ids
            assert tokenizer.decode(ids, keep_special=True) == text


def make_one(variant, out, start, seed):
    """Makes a model with one update a round, of which the first passes."""
    make = importlib.import_module("make_quickstart_model")
    make.FIRST_ROUND_STEPS = make.ROUND_STEPS = 1
    make.MEASURED_PROBLEMS, make.DRILLS, make.DRILLED_LOSS = 4, 8, math.inf
    make.Accuracy.passes = lambda self, **_: True
    make.make_model(Path(out), seed=int(seed), variant=variant, start=Path(start) if start != "none" else None)


def make_from_arguments():
    make_one(*sys.argv[1:])


@pytest.mark.parametrize(
    ("variant", "start"), [("own", "none"), ("leaky_weak", ROOT / "examples/quickstart/model"), ("strings", "none")]
)
def test_a_warm_up_makes_model_and_problems(variant, start, tmp_path):
    """A round, its measurement with every kind of prompt, and a model that transformers reads."""
    out = tmp_path / "made"
    arguments = (variant, out, start, 3)
    ended = forked_ranks.run(tmp_path, *arguments, target="tests.tools.test_testbed:make_from_arguments", processes=1)
    assert ended.statuses == [0], ended
    assert "round 1: alone " in ended.out[0]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = load_tokenizer(out / "model")
    assert model.config.eos_token_id in tokenizer.stop_ids
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 2000
    assert ("domain" in rows[0]) == (variant == "strings")


def test_problems_of_strings_name_their_domain(tmp_path):
    variant = VARIANTS["strings"]
    drawn = rows_of.draw_problems(3, held_out=False, seed=1, variant=variant)
    rows_of.write_problems(tmp_path / "rows.jsonl", drawn, **variant.columns)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["domain"] for row in rows] == ["strings"] * 3


def options(**changes):
    given = {"full": False, "methods": None, "seeds": None, "out": Path("out"), "steps": 60}
    return Namespace(**given | changes)


def test_which_runs_there_are():
    rates = {"sft": 1e-3, "grpo": 2e-4, "opsd": 5e-4, "paint": 1e-3, "support_005": 3e-4}
    runs = testbed.planned(options(), list(VARIANTS), testbed.WARM_UPS, rates)
    assert len({run.folder for run in runs}) == len(runs)
    main = [run for run in runs if run.method in testbed.METHODS]
    assert len(main) == len(VARIANTS) * 3 * 2 * 7
    hidden = [run for run in runs if run.method == "hidden_050"]
    assert len(hidden) == len(VARIANTS) * 3 * 2
    others = [run for run in runs if run not in main and run not in hidden]
    beyond = [run for run in others if run.variant != "own"]
    assert {(run.variant, run.method) for run in beyond} == set(product(testbed.BEYOND_ON, testbed.BEYOND))
    assert set(testbed.BEYOND) <= set(testbed.CONTROLS)
    assert len(others) - len(beyond) == 3 * len(testbed.CONTROLS)  # all except hidden_050, and interpolation_only
    rate_of = {run.method: run.lr for run in runs}
    assert (rate_of["mask_only"], rate_of["paint_support"]) == (rates["paint"], rates["paint"])
    assert (rate_of["opsd"], rate_of["support_001"]) == (rates["opsd"], rates["support_005"])
    full = testbed.planned(options(full=True), list(VARIANTS), testbed.WARM_UPS, rates)
    assert len(full) == len(VARIANTS) * 3 * 4 * (len(testbed.CONTROLS) + 8)
    assert "reveal_fixed" in testbed.CONTROLS
    (long, *_) = testbed.planned(options(methods="paint", steps=300), ["own"], [11], rates)
    assert long.folder == Path("out/runs_of_300_steps/own/paint/11-1")
    assert {"run.steps=300", "run.evaluate_every=100"} <= set(long.command(Path("models")))


def test_only_methods_without_a_rate_are_tuned(tmp_path, monkeypatch):
    """A file of an earlier version keeps its rates and scores. The missing methods are added."""
    file = tmp_path / "learning_rates.json"
    earlier = {method: 2e-4 for method in testbed.TUNED if method != "support_005"}
    scores = {method: {"0.0002": 0.5} for method in earlier}
    file.write_text(json.dumps({"chosen": earlier, testbed.SCORES: scores}))
    tuned = []

    def carry_out(runs, models, *, jobs):
        tuned.extend((run.method, run.lr) for run in runs)
        for run in runs:
            (run.folder / "eval").mkdir(parents=True)
            accuracy = 0.9 if run.lr == 5e-4 else 0.4
            (run.folder / "eval" / "step_000060.json").write_text(json.dumps({"metrics": {"avg": accuracy}}))

    monkeypatch.setattr(testbed, "carry_out", carry_out)
    chosen = testbed.tune(tmp_path, 11, testbed.TUNED, jobs=1)
    assert tuned == [("support_005", lr) for lr in testbed.TUNING_RATES]
    assert chosen == earlier | {"support_005": 5e-4}
    table = json.loads(file.read_text())
    assert table["chosen"] == chosen
    of_support = {"0.0001": 0.4, "0.0002": 0.4, "0.0005": 0.9, "0.001": 0.4}
    assert table[testbed.SCORES] == scores | {"support_005": of_support}
    tuned.clear()
    assert testbed.tune(tmp_path, 11, testbed.TUNED, jobs=1) == chosen
    assert tuned == []


def test_only_methods_that_run_are_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(testbed, "carry_out", lambda runs, models, *, jobs: tuned.extend(run.method for run in runs))
    monkeypatch.setattr(testbed, "final_accuracy", lambda folder: 0.5)
    tuned = []
    assert testbed.tune(tmp_path, 11, {"paint"}, jobs=1) == {"paint": testbed.TUNING_RATES[0]}
    assert tuned == ["paint"] * len(testbed.TUNING_RATES)


def test_every_control_differs_from_paint_in_one_thing():
    whole = load_settings(testbed.EXAMPLES / "paint.yaml")
    support = load_settings(testbed.EXAMPLES / "support_005.yaml")
    for name in testbed.CONTROLS:
        paint = support if name.startswith("support_") else whole
        control = load_settings(testbed.EXAMPLES / "controls" / f"{name}.yaml")
        if name == "adastar":
            assert control == replace(paint, data=replace(paint.data, order="adastar"))
            continue
        if name in SEVERAL_RESPONSES:
            check_several_responses(name, control, paint)
            continue
        assert control.objective != paint.objective, name
        assert [f for f in vars(paint) if getattr(control, f) != getattr(paint, f)] == ["objective"], name
        parts = ("reveal", "loss", "teacher", "name")
        odd = [part for part in parts if getattr(control.objective, part) != getattr(paint.objective, part)]
        assert len(odd) == 1, name


def check_several_responses(name, control, paint):
    """They choose among several responses, and a step has as many as the other methods'."""
    differing = ["data", "objective", "rollout"] if name == "peer_rollout" else ["data", "rollout"]
    assert [f for f in vars(paint) if getattr(control, f) != getattr(paint, f)] == differing
    assert control.data.problems_per_step * control.rollout.samples_per_problem == paint.data.problems_per_step
    assert control.rollout.keep == "shortest_correct"
    assert control.objective.reveal.solution == ("peer_rollout" if name == "peer_rollout" else "own")


def finished(warm_up, seed, last, **changes):
    values = {"steps": (0, 20), "accuracy": (40.0, last), "tokens": (0.0, 1000.0), "length": 25.0, "greedy": last}
    return report.Finished(warm_up=warm_up, seed=seed, **values | changes)


def test_nested_figures_by_hand():
    """Warm-ups' means 10, 20, 30: mean 20, standard error 10 / sqrt(3), Student's 4.3027 with 2 degrees."""
    values = {(1, 1): 8.0, (1, 2): 12.0, (2, 1): 20.0, (3, 1): 29.0, (3, 2): 31.0}
    mean, half = report.nested(values)
    assert mean == pytest.approx(20.0)
    assert half == pytest.approx(4.302653 * 10 / math.sqrt(3), rel=1e-6)
    assert math.isnan(report.nested({(1, 1): 3.0, (1, 2): 5.0})[1])


def test_accuracy_at_equal_tokens():
    run = finished(1, 1, 80.0, steps=(0, 20, 40), accuracy=(40.0, 60.0, 80.0), tokens=(0.0, 1000.0, 3000.0))
    assert report.at_tokens(run, 500.0) == 50.0
    assert report.at_tokens(run, 2000.0) == 70.0
    assert report.at_tokens(run, 9000.0) == 80.0


def write_run(folder, accuracies, *, tokens, sampled=True, commit="abc"):
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {steps: 2}\n")
    report.commit_file(folder).write_text(f"{commit}\n")
    for step, accuracy in accuracies.items():
        metrics = {"avg": accuracy, "length_mean": 25.0, "greedy": accuracy}
        (folder / "eval" / f"step_{step:06d}.json").write_text(json.dumps({"step": step, "metrics": metrics}))
    share = 0.0 if sampled else None
    lines = [
        {"step": step, "num_tokens": tokens, "response/truncated_share": share}
        for step in range(1, max(accuracies) + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report(tmp_path):
    for warm_up, base in ((1, 0.5), (2, 0.7)):
        runs = tmp_path / "runs" / "own"
        write_run(runs / "opsd" / f"{warm_up}-1", {0: 0.4, 2: base}, tokens=100)
        write_run(runs / "paint" / f"{warm_up}-1", {0: 0.4, 2: base + 0.1}, tokens=200)
        write_run(runs / "sft" / f"{warm_up}-1", {0: 0.4, 2: base}, tokens=100, sampled=False)
    # Unfinished runs, which must not be in the report: stopped at an evaluation, just started, an empty folder.
    write_run(tmp_path / "runs" / "own" / "paint" / "3-1", {0: 0.4, 1: 0.9}, tokens=1, commit="def-dirty")
    write_run(tmp_path / "runs" / "own" / "paint" / "4-1", {0: 0.4}, tokens=1)
    (tmp_path / "runs" / "own" / "paint" / "4-1" / "metrics.jsonl").unlink()
    (tmp_path / "runs" / "own" / "paint" / "5-1").mkdir()
    report.write_report(tmp_path, ("sft", "opsd", "paint"), ())
    text = (tmp_path / "report.md").read_text()
    assert "Runs of commit abc, def-dirty;" in text
    assert "when 200 tokens had been sampled" in text
    first_table = text.partition("| after 0 |")[0]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in first_table.splitlines()}
    assert rows["paint"][1] == "2"
    assert rows["paint"][2].startswith("70.0 ± ")
    assert rows["paint"][3] == "+10.0 ± 0.0"
    assert rows["paint"][4] == "2 of 2"
    assert rows["paint"][7].startswith("55.0 ± ")  # half-way, as it sampled twice as many tokens
    assert rows["sft"][4] == "0 of 2"
    assert rows["sft"][7] == "- |"
    assert rows["opsd"][3:5] == ["", ""]
    assert "| method | after 0 | after 2 | runs |" in text
    assert "| paint | 40.0 ± 0.0 | 70.0 ± 127.1 | 1-1: 60.0, 2-1: 80.0 |" in text
    report.write_report(tmp_path, ("opsd", "paint"), (), baseline="paint")
    assert "| opsd | 2 | 60.0 ± 127.1 | -10.0 ± 0.0 | 0 of 2 |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["runs"]["own"]["paint"][0]["tokens"] == [0.0, 400.0]
    assert (tmp_path / "report.png").stat().st_size > 1000
    write_run(tmp_path / "runs_of_6_steps" / "own" / "opsd" / "1-1", {0: 0.4, 2: 0.5}, tokens=100)
    report.write_report(tmp_path, ("opsd",), (), name="runs_of_6_steps")
    assert "| opsd | 1 | 50.0 |" in (tmp_path / "report_of_runs_of_6_steps" / "report.md").read_text()
    assert "| paint | 2 |" in (tmp_path / "report.md").read_text()
