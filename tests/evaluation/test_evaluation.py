"""The evaluate command without a model: benchmarks, answers on disk, recorded responses, comparisons."""

import json
import math
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from megatron_paint.base.errors import UserError
from megatron_paint.cli.evaluate_model import fingerprint
from megatron_paint.cli.evaluate_options import requested
from megatron_paint.cli.main import main
from megatron_paint.config.settings import EvaluationSettings
from megatron_paint.evaluation.answer_file import AnswerFile
from megatron_paint.evaluation.benchmarks import NAMED, load_benchmarks
from megatron_paint.evaluation.compare import compare_files
from megatron_paint.evaluation.statistics import mean_interval, pass_at_k, sign_flip_p_value
from megatron_paint.evaluation.summary import read_reports
from megatron_paint.records import Rollout

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not beside the repository")

# Read by eye: what the last box holds and whether it is the reference's answer. 0003's reference is damaged in its
# source ("4:30p.." for 4:30 p.m.): a reader accepts the response, the grader cannot.
BY_HAND = {
    "0003-s0": (r"4:30 \text{ p.m.}", False),
    "0006-s7": (r"\frac{5}{16}", False),
    "0028-s1": ("11", False),
    "0037-s4": (r"1 \frac{1}{9}", False),
    "0054-s6": ("13", False),
    "0070-s0": ("19", False),
    "0072-s1": ("9998", False),
    "0072-s7": ("10000", True),  # of 10{,}000: the source's own grader called it wrong
    "0084-s4": ("40", False),
    "0000-s0": ("420", True),
    "0010-s5": ("48", True),
    "0020-s1": ("76", True),
    "0029-s7": (r"\frac{11}{13}", True),
    "0039-s1": ("1020", True),
    "0048-s1": ("6", True),
    "0058-s0": ("12", True),
    "0067-s4": ("8", True),
    "0078-s1": ("800", True),
    "0089-s2": ("5", True),
    "0003-s6": (r"4:30 \text{ p.m.}", False),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(problems, responses, folder of the results) of 100 problems with 8 real rollouts each."""
    folder = tmp_path_factory.mktemp("recorded")
    rows = [json.loads(line) for line in (DATA / "rollouts_qwen25math_math100x8.jsonl").read_text().splitlines()]
    groups = defaultdict(list)
    for row in rows:
        groups[row["id"].rpartition("-s")[0]].append(row)
    problems = [{"id": id, "problem": g[0]["problem"], "answer": g[0]["answer"]} for id, g in groups.items()]
    responses = [
        {"id": id, "sample": int(row["id"].rpartition("-s")[2]), "response": row["rollout"]}
        for id, group in groups.items()
        for row in group
    ]
    write(folder / "math100.jsonl", problems)
    write(folder / "responses.jsonl", responses)
    assert grade(folder) == 0
    return folder, rows


def grade(folder, *arguments, responses="responses.jsonl"):
    options = ("--benchmarks", str(folder / "math100.jsonl"), "--out", str(folder / "out"), "--quiet")
    unhurried = "evaluation.grading_seconds=20"  # on a busy machine as well
    return main(["evaluate", "--responses", str(folder / responses), *options, *arguments, unhurried])


@needs_data
def test_recorded_rollouts_by_hand(recorded):
    (report,) = read_reports(recorded[0] / "out")
    found = {f"{a.problem_id.removeprefix('qwen25math-math')}-s{a.sample_index}": a for a in report.answers}
    assert {name: (found[name].extracted, found[name].outcome == "right") for name in BY_HAND} == BY_HAND


@needs_data
def test_recorded_rollouts_agree_with_their_source(recorded):
    """Of 800 verdicts of another grader all but 4 are ours; three are of answers with units or a damaged reference."""
    folder, rows = recorded
    (report,) = read_reports(folder / "out")
    theirs = {row["id"]: row["correct"] for row in rows}
    odd = [a for a in report.answers if (a.outcome == "right") != theirs[f"{a.problem_id}-s{a.sample_index}"]]
    assert len(odd) <= 4
    scores = np.array([sum(theirs[f"qwen25math-math{n:04d}-s{k}"] for k in range(8)) for n in range(100)])
    metrics = report.metrics
    assert metrics["avg"] == pytest.approx(scores.sum() / 800, abs=4 / 800)
    closed = np.mean([1 - math.comb(8 - c, 4) / math.comb(8, 4) for c in scores])
    assert metrics["pass@4"] == pytest.approx(closed, abs=0.01)
    assert metrics["no_answer_share"] == sum(not row["prediction"] for row in rows) / 800
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["benchmarks"]["math100"]["avg"] == metrics["avg"]
    assert f"| math100 | 100 | {100 * metrics['avg']:.1f} (n = 8) |" in (folder / "out" / "summary.md").read_text()
    assert (folder / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_pass_at_k_and_intervals_against_scipy():
    generator = np.random.default_rng(3)
    scores = generator.integers(0, 13, size=90) / 12
    ours = mean_interval([scores], key="any")
    theirs = scipy.stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=generator)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)
    for right in range(13):
        for k in (1, 3, 12):
            assert pass_at_k(right, 12, k) == pytest.approx(1 - scipy.stats.hypergeom(12, right, k).pmf(0))


@pytest.mark.parametrize(("problems", "shift"), [(8, 0.2), (12, 0.05), (60, 0.05), (300, 0.0)])
def test_p_values_against_scipy(problems, shift):
    generator = np.random.default_rng(problems)
    differences = generator.integers(-4, 5, size=problems) / 12 + shift
    theirs = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=100_000, rng=generator
    )
    assert sign_flip_p_value([differences], key="k") == pytest.approx(theirs.pvalue, abs=0.006)


def test_p_values_at_the_ends():
    assert sign_flip_p_value([np.array([0.1, 0.2, -0.3])], key="k") == 1.0  # a sum of 0 but for rounding
    assert sign_flip_p_value([np.zeros(40)], key="k") == 1.0
    assert sign_flip_p_value([np.full(10, 0.1)], key="k") == 2 / 2**10
    assert sign_flip_p_value([np.full(50, 0.1)], key="k") == 1 / 100_001
    assert sign_flip_p_value([np.full(5, 0.1), np.zeros(7)], key="k") == 2 / 2**5


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Folder with evaluations of 20 problems, 2 samples each: `low`, `high`, right on 5 and on 15, and others."""
    folder = tmp_path_factory.mktemp("evaluated")
    problems = [{"id": f"p{i}", "problem": "?", "answer": str(i)} for i in range(20)]
    write(folder / "set.jsonl", problems)
    write(folder / "part.jsonl", problems[:10])
    for name, right, benchmark in (("low", 5, "set"), ("high", 15, "set"), ("part", 5, "part"), ("none", 0, "set")):
        rows = [
            {"id": f"p{i}", "response": f"\\boxed{{{i if i < right else 'no'}}}"}
            for i in range(20 if benchmark == "set" else 10)
            for _ in range(2)
        ]
        write(folder / f"{name}-responses.jsonl", rows)
        options = ("--benchmarks", str(folder / f"{benchmark}.jsonl"), "--out", str(folder / name), "--quiet")
        assert main(["evaluate", "--responses", str(folder / f"{name}-responses.jsonl"), *options]) == 0
    return folder


def test_compare(evaluated, tmp_path, capsys):
    """Ten of twenty problems go from wrong to right: +50 points, and p the chance of ten equal signs."""
    (row,) = compare_files(evaluated / "low", evaluated / "high" / "set.json")
    assert (row.a, row.b, row.problems) == (0.25, 0.75, 20)
    assert row.difference.mean == pytest.approx(0.5)
    assert 0.2 < row.difference.low < 0.4 < 0.6 < row.difference.high < 0.8
    assert row.p_value == 2 / 2**10
    (same,) = compare_files(evaluated / "low", evaluated / "low")
    assert (same.difference.mean, same.p_value) == (0.0, 1.0)
    out = tmp_path / "table.md"
    assert main(["evaluate", "compare", str(evaluated / "none"), str(evaluated / "high"), "--out", str(out)]) == 0
    assert "< 0.0001" in capsys.readouterr().out
    assert "| set | 20 | 0.0 | 75.0 | +75.0 [" in out.read_text()
    assert main(["compare", str(evaluated / "low"), str(evaluated / "high"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["p_value"] == row.p_value


def test_what_cannot_be_compared(evaluated, tmp_path, capsys):
    assert main(["compare", str(evaluated / "low"), str(evaluated / "part")]) == 2
    assert "Only evaluations on the same benchmarks can be compared" in capsys.readouterr().err
    renamed = json.loads((evaluated / "part" / "part.json").read_text()) | {"benchmark": "set"}
    (tmp_path / "set.json").write_text(json.dumps(renamed))
    assert main(["compare", str(evaluated / "low"), str(tmp_path / "set.json")]) == 2
    assert "only evaluations on the same problems can be compared" in capsys.readouterr().err
    for content in ("{", '{"answers": []}', "[" * 100_000, json.dumps(renamed | {"answers": []})):
        (tmp_path / "set.json").write_text(content)
        assert main(["compare", str(evaluated / "low"), str(tmp_path / "set.json")]) == 2
        assert "cannot read the evaluation" in capsys.readouterr().err
    for content in ("{", "[]", '{"benchmarks": 3}', "{}"):
        (tmp_path / "summary.json").write_text(content)
        assert main(["compare", str(evaluated / "low"), str(tmp_path)]) == 2
        assert "holds no evaluation" in capsys.readouterr().err


def test_evaluations_that_were_sampled_otherwise_are_told(evaluated, tmp_path, capsys):
    for name, temperature in (("a", 1.0), ("b", 0.6)):
        shutil.copytree(evaluated / "low", tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        summary["sampled_with"] = {"model": name, "temperature": temperature, "seed": 1}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "the two were sampled otherwise: temperature 1.0 and 0.6" in capsys.readouterr().err


PROBLEMS = [{"id": "a", "problem": "p", "answer": "1"}, {"id": "b", "problem": "p", "answer": "2"}]
BOTH = [{"id": "a", "response": "\\boxed{1}"}, {"id": "b", "response": "\\boxed{1}"}]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (BOTH[:1], r"problem 'b' has 0 responses and others 1 \(1 such"),
        ([], r"has 0 responses"),
        ([*BOTH, {"id": "c", "response": ""}], r"r.jsonl:3: no benchmark has a problem 'c'"),
        ([*BOTH, {"id": "a", "sample": 0, "response": ""}], r"sample 0 of problem 'a' is in the file twice"),
        ([{"id": "a", "text": "1"}], r"r.jsonl:1: not an object"),
        ([{"id": "a", "response": 1}], r"response is a int"),
        ([{"id": "a", "response": "", "sample": "1"}], r"whole numbers"),
        ([{"id": "a", "response": "", "sample": -1}], r"whole numbers from 0"),
        ([{"id": "a", "response": "", "num_tokens": True}], r"whole numbers from 0"),
    ],
)
def test_responses_that_cannot_be_graded(rows, says, tmp_path, capsys):
    problems, responses = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "r.jsonl", rows)
    status = main(
        ["evaluate", "--responses", str(responses), "--benchmarks", str(problems), "--out", str(tmp_path / "o")]
    )
    assert status == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


def test_lengths_that_are_not_known(tmp_path, capsys):
    problems, responses = write(tmp_path / "p.jsonl", PROBLEMS), write(tmp_path / "r.jsonl", BOTH)
    line = ["evaluate", "--responses", str(responses), "--benchmarks", str(problems), "--out", str(tmp_path / "o")]
    assert main(line) == 0
    (report,) = read_reports(tmp_path / "o")
    assert report.metrics["avg"] == 0.5
    assert report.metrics["length_mean"] is None
    assert "Avg@1 50.0 %" in capsys.readouterr().out
    assert "nan" not in (tmp_path / "o" / "summary.md").read_text()


def test_named_benchmarks(monkeypatch):
    """What is asked of `datasets`, and the answers as the sets hold them."""
    asked = []
    rows = {
        "HuggingFaceH4/aime_2024": [{"id": 60, "problem": "p", "answer": "204", "solution": "s"}],
        "yentinglin/aime_2025": [{"id": "0", "problem": "p", "answer": "70", "solution": "70"}],
        "MathArena/hmmt_feb_2025": [{"problem_idx": 1, "problem": "p", "answer": "103"}],
        "HuggingFaceH4/MATH-500": [{"unique_id": "t/1.json", "problem": "p", "answer": "\\pi", "solution": "s"}],
        "openai/gsm8k": [{"question": "q", "answer": "5 + 5 = <<5+5=10>>10\n#### 1,010"}],
    }

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return rows[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = load_benchmarks(["aime24", "aime25", "hmmt25", "math500", "gsm8k"], EvaluationSettings())
    assert [(b.name, b.problems[0].id, b.problems[0].answer) for b in found] == [
        ("aime24", "60", "204"),
        ("aime25", "0", "70"),
        ("hmmt25", "1", "103"),
        ("math500", "t/1.json", "\\pi"),
        ("gsm8k", "gsm8k:main:1", "1010"),
    ]
    assert asked[-1] == ("openai/gsm8k", "main", "test")
    rows["openai/gsm8k"] = [{"question": "q", "answer": "10"}]
    with pytest.raises(UserError, match="the answer holds no '####'"):
        load_benchmarks(["gsm8k"], EvaluationSettings())
    assert set(NAMED) == {"aime24", "aime25", "hmmt25", "math500", "gsm8k"}


@needs_data
def test_benchmark_files():
    files = ["aime2024", "aime2025", "hmmt_feb_2025", "math500", "gsm8k_test"]
    found = load_benchmarks([str(DATA / f"{name}.jsonl") for name in files], EvaluationSettings())
    assert {one.name: len(one.problems) for one in found} == dict(zip(files, (30, 30, 30, 500, 1319), strict=True))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["aime2"], "'aime2' is neither a known benchmark nor a file.*Did you mean 'aime2[45]'"),
        (["nothing.jsonl"], "there is no file nothing.jsonl"),
        (["{p}", "{p}"], "names 'p' twice"),
        (["{s}"], "would take the place of the summary"),
    ],
)
def test_benchmarks_that_are_not_there(names, says, tmp_path):
    path, summary = (write(tmp_path / f"{name}.jsonl", PROBLEMS) for name in ("p", "summary"))
    with pytest.raises(UserError, match=says):
        load_benchmarks([name.format(p=path, s=summary) for name in names], EvaluationSettings())


def rollout(id, sample, ids=(1, 2)):
    return Rollout(problem_id=id, sample_index=sample, prompt_ids=(), response_ids=ids, logprobs=None, finished=True)


def answer_file(path, prompts=None, **sampled_with):
    return AnswerFile(path, {"model": "m", "temperature": 1.0} | sampled_with, prompts or {"a": "x", "b": "y"})


def test_answers_are_kept(tmp_path):
    path = tmp_path / "sub" / "a.jsonl"
    assert answer_file(path).begin() == {}
    answer_file(path).add([rollout("a", 0), rollout("a", -1, ids=(7,))])
    whole = path.read_bytes()
    assert answer_file(path).begin() == {("a", 0): rollout("a", 0), ("a", -1): rollout("a", -1, ids=(7,))}
    assert path.read_bytes() == whole
    header = whole.index(b"\n") + 1  # it is there whole or not at all
    for cut in range(header, len(whole)):  # a crash at any byte loses the answer in the making and no other
        path.write_bytes(whole[:cut])
        there = answer_file(path).begin()
        assert len(there) == whole[: cut + 1].count(b"\n") - 1
        answer_file(path).add([rollout("b", 0)])
        assert ("b", 0) in answer_file(path).begin()


def test_answers_to_problems_that_are_left_out_for_once_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    answer_file(path).begin()
    answer_file(path).add([rollout("a", 0), rollout("b", 0)])
    whole = path.read_bytes()
    assert set(answer_file(path, {"a": "x"}).begin()) == {("a", 0), ("b", 0)}
    assert path.read_bytes() == whole
    with path.open("a") as file:
        file.write("cut sho")  # so that it is written anew
    answer_file(path, {"a": "x"}).begin()
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match="another prompt of problem 'b'"):
        answer_file(path, {"a": "x", "b": "z"}).begin()


@pytest.mark.parametrize(
    "line",
    [
        '{"sample": 0, "response_ids": [1], "finished": true}',
        '{"id": "a", "sample": 0, "response_ids": [1]}',
        '{"id": "a", "sample": 0, "response_ids": 3, "finished": true}',
        '{"id": "a", "sample": 0, "response_ids": ["x"], "finished": true}',
        '{"id": ["a"], "sample": 0, "response_ids": [1], "finished": true}',
        "[" * 100_000,
    ],
    ids=range(6),
)
def test_a_damaged_answer_is_sampled_again(line, tmp_path):
    path = tmp_path / "a.jsonl"
    answer_file(path).begin()
    answer_file(path).add([rollout("b", 0)])
    with path.open("a") as file:
        file.write(line + "\n")
    assert answer_file(path).begin() == {("b", 0): rollout("b", 0)}
    assert line not in path.read_text()


def test_answers_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    answer_file(path, seed=1).begin()
    answer_file(path, seed=1).add([rollout("a", 0)])
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        answer_file(path, seed=2).begin()
    with pytest.raises(UserError, match="another prompt of problem 'a'"):
        answer_file(path, {"a": "z"}, seed=1).begin()
    assert answer_file(path, {"a": "x", "c": "new"}, seed=1).begin() == {("a", 0): rollout("a", 0)}
    for content in ('{"id": "a"}\n', "my notes\nline two\n"):
        path.write_text(content)
        with pytest.raises(UserError, match="is no file of answers"):
            answer_file(path).begin()
        assert path.read_text() == content


def test_other_weights_in_the_same_place_are_told(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("any")
    assert fingerprint(tmp_path) == before
    for place in (0, 150_000, 299_999):
        content = bytearray(300_000)
        content[place] = 1
        file.write_bytes(content)
        assert fingerprint(tmp_path) != before


def test_responses_to_benchmarks_that_share_ids(tmp_path, capsys):
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", PROBLEMS)
    responses = write(tmp_path / "r.jsonl", BOTH)
    both = f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"
    assert main(["evaluate", "--responses", str(responses), "--benchmarks", both, "--out", str(tmp_path / "o")]) == 2
    assert "one and two both have a problem 'a'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give --model FOLDER, or a settings file"),
        ({"model": Path("nowhere")}, "nowhere is neither a Hugging Face folder"),
        ({"model": "hf"}, "give --benchmarks"),
        ({"model": "hf", "benchmarks": "a.jsonl", "samples": 0}, "evaluation.samples"),
        ({"model": "bare", "benchmarks": "a.jsonl"}, "model.hf_path is not set"),
        ({"model": "broken", "benchmarks": "a.jsonl"}, "run_state.json is not readable"),
    ],
)
def test_what_cannot_be_evaluated(options, says, tmp_path):
    for name in ("hf", "bare", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "bare" / ".metadata").write_text("")
    (tmp_path / "broken" / ".metadata").write_text("")
    (tmp_path / "broken" / "run_state.json").write_text("{}")
    if isinstance(options.get("model"), str):
        options = options | {"model": tmp_path / options["model"]}
    nothing = {"config": None, "model": None, "benchmarks": None, "samples": None, "out": None, "overrides": []}
    with pytest.raises(UserError, match=says):
        requested(**nothing | options)
