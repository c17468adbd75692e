"""What the report reads of a run folder: values worked by hand, and one notice for everything that is missing."""

import json
import re
import shutil
import time

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.evaluation.statistics import paired_difference
from megatron_paint.evaluation.summary import read_report
from megatron_paint.report.build import names_of, write_report
from megatron_paint.report.console_events import Start, read_console, start_at_step, start_at_time
from megatron_paint.report.curves import columns, derived, phases, plots_for
from megatron_paint.report.reader import RunReader, answer_columns, sample_columns
from megatron_paint.report.samples import page_content, read_sample_file
from megatron_paint.report.settings_table import settings_rows
from megatron_paint.run.folder import RunFolder
from tests.report.made_run import LOG, decode, evaluation, group_sample, make_run, read_block, sample


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def read(path):
    reader = RunReader(path)
    reader.check()
    return reader.read()


def notices(path):
    return read(path).summary["notices"]


def test_metrics_become_columns(run):
    summary = read(run).summary
    assert summary["steps"] == [1, 2, 3]
    assert summary["metrics"]["loss"] == [1.0, 0.5, 0.333333]
    assert summary["metrics"]["entropy/gap"] == [0.375] * 3  # student - teacher
    assert summary["metrics"]["time/other_s"] == [0.5] * 3  # 100 tokens at 50 a second, less 1.5 s in phases
    assert "reward/mean" not in summary["metrics"]  # it never has a value
    assert summary["phases"] == ["time/rollout_s", "time/student_s", "time/other_s"]
    assert (summary["last"], summary["planned"], summary["finished"], summary["tokens"]) == (3, 3, True, 300)
    assert summary["notices"] == []


def test_a_step_without_a_value_has_none():
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "b": True}, {"step": 3, "a": 123456789.0}]
    assert columns(lines) == {"a": [1.0, None, 123457000.0]}
    assert derived({"num_tokens": 10, "tokens_per_second": 0.0, "time/mask_s": 1.0}) == {}
    assert derived({"num_tokens": 10, "tokens_per_second": 100.0, "time/mask_s": 1.0}) == {"time/other_s": 0.0}
    assert phases(["time/other_s", "time/own_s", "time/optimizer_s", "time/mask_s", "loss"]) == [
        "time/mask_s",
        "time/optimizer_s",
        "time/own_s",
        "time/other_s",
    ]


def test_every_number_has_a_plot(run):
    keys = list(read(run).summary["metrics"])
    plots = plots_for(keys)
    shown = [series["key"] for plot in plots for series in plot["series"]]
    assert sorted(shown) == sorted(key for key in keys if key != "num_tokens" and not key.startswith("time/"))
    assert [plot["title"] for plot in plots if plot["more"]] == ["own/metric"]
    assert [plot["id"] for plot in plots if plot["log"]] == ["grad_norm"]


def test_evaluations_have_intervals_and_paired_differences(run):
    first, second = read(run).summary["evaluations"]
    assert (first["step"], first["avg"], first["low"], first["high"]) == (0, 0.25, 0.0, 0.5)
    assert first["difference"] is None
    found = paired_difference(before=evaluation(0, 1), after=evaluation(3, 3))
    assert found.mean == 0.5  # problem 0 goes from 1/2 to 1, problem 1 from 0 to 1/2
    assert second["difference"] == [found.mean, found.low, found.high]


def test_the_console_gives_starts_and_warnings_in_order():
    console = read_console(LOG)
    assert [(start.when, start.host, start.after_step) for start in console.starts] == [
        ("2026-11-29 23:47:26 UTC", "node1", 0),
        ("2026-11-29 23:50:00 UTC", "node2", 2),
    ]
    assert console.starts[1].command == "megatron-paint train paint.yaml run.resume=auto"
    found = [(event.kind, event.start, event.time, event.after_step, event.text[:18]) for event in console.events]
    assert found == [
        ("warning", 1, "23:47:49", 1, "the first warning"),
        ("end", 1, "23:47:51", 2, "Stopped after step"),
        ("warning", 2, "23:50:11", 3, "the second warning"),
    ]
    assert console.facts == {
        "model": "299,776 weights, 2 layers",
        "memory": "training 18 MB a rank; sampling 7 MB a rank",
    }


def test_settings_say_what_differs(tmp_path):
    one = make_run(tmp_path / "one", seed=7)
    two = make_run(tmp_path / "two")
    rows = {row["key"]: row for row in settings_rows([read(one).tree, read(two).tree])}
    assert rows["run.seed"]["values"] == ["7", "1"]
    assert (rows["run.seed"]["default"], rows["run.seed"]["changed"], rows["run.seed"]["differs"]) == ("1", True, True)
    assert (rows["run.steps"]["changed"], rows["run.steps"]["differs"]) == (True, False)  # 3, and not 100, in both
    assert (rows["optimizer.lr"]["changed"], rows["optimizer.lr"]["differs"]) == (False, False)
    assert rows["model.hf_path"]["default"] == "none, must be set"
    assert list(rows).index("model.hf_path") < list(rows).index("optimizer.lr")


def test_a_setting_that_an_older_run_did_not_have_counts_as_its_default(tmp_path):
    tree = read(make_run(tmp_path / "run")).tree
    older = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    del older["run"]["keep_top_tokens"]
    rows = {row["key"]: row for row in settings_rows([tree, older])}
    assert rows["run.keep_top_tokens"]["values"] == ["0", "0"]
    assert not rows["run.keep_top_tokens"]["differs"]


def test_samples_are_listed_and_in_pages(run):
    data = read(run)
    found = sample_columns([data])
    assert found["id"] == [f"problem-{number}" for number in range(4)] * 3
    assert found["step"] == [1] * 4 + [2] * 4 + [3] * 4
    assert found["loss"] == [0.125, 0.25, 0.375, 0.5, 0.25, 0.375, 0.5, 0.625, 0.375, 0.5, 0.625, 0.75]
    assert found["reveal"][:4] == [1.0, 0.8, 0.6, 0.4]
    assert found["finished"][:4] == [True, False, True, True]
    assert found["page"][4:6] == ["2_0", "2_0"]
    assert found["place"][4:8] == [0, 1, 2, 3]


def test_a_column_without_a_value_in_any_run_is_left_out(tmp_path):
    paint, grpo = make_run(tmp_path / "paint", steps=1), make_run(tmp_path / "grpo", steps=0)
    RunFolder(grpo).write_samples(1, [group_sample(1, number) for number in range(8)])
    alone = sample_columns([read(grpo)])
    assert not {"overlap", "reveal"} & set(alone)
    assert alone["reward"] == [1.0, 0.0, 0.0, 0.0] * 2
    assert alone["advantage"] == [1.5, -0.5, -0.5, -0.5] * 2
    assert not {"reward", "advantage"} & set(sample_columns([read(paint)]))
    both = sample_columns([read(paint), read(grpo)])
    assert both["overlap"] == [0.0, 0.25, 0.5, 0.75] + [None] * 8
    assert both["reward"] == [None] * 4 + alone["reward"]
    assert sample_columns([])["id"] == []  # a run that has only begun


def test_answers_of_evaluations_are_listed_and_in_pages(run):
    """Two problems with two answers each: one of four answers is right at step 0, three are at step 3."""
    pages = {}
    data = RunReader(run).read(lambda key, content: pages.update({key: content}))
    found = answer_columns([data])
    assert found["step"] == [0, 0, 3, 3]
    assert found["id"] == ["held-0", "held-1"] * 2
    assert found["right"] == [1, 0, 2, 1]
    assert found["share"] == [0.5, 0.0, 1.0, 0.5]
    assert found["change"] == [0.0, 0.0, 0.5, 0.5]
    assert found["cut_off"] == [1, 1, 1, 1]
    assert found["tokens"] == [4, 6, 4, 6]  # the means of 3 and 4, and of 5 and 6, rounded to even
    assert "greedy" not in found
    assert found["page"] == ["e0_0", "e0_0", "e3_0", "e3_0"]
    entry = pages["e0_0"]["entries"][1]
    assert (entry["problem"], entry["reference"], entry["domain"]) == ("41+1-1?", "41", "math")
    answer = {"outcome": "wrong", "text": "so it is \\boxed{3}", "extracted": "3", "tokens": 6, "finished": False}
    assert entry["answers"][1] == {"sample": 1, "error": ""} | answer


def test_answers_have_greedy_ones_and_may_have_no_problem(run):
    file = run / "eval" / "step_000003.json"
    content = json.loads(file.read_text())
    del content["problems"]  # of an earlier version
    greedy = [{**content["answers"][place], "sample_index": -1} for place in (0, 3)]
    file.write_text(json.dumps({**content, "answers": [*content["answers"], *greedy]}))
    reader = RunReader(run)
    found = answer_columns([reader.read()])
    assert found["greedy"] == [None, None, True, False]
    assert found["right"] == [1, 0, 2, 1]  # without the greedy answers
    entry = reader.page("e3_0", None)["entries"][0]
    assert "problem" not in entry
    assert [answer["sample"] for answer in entry["answers"]] == [0, 1, -1]


def test_pages_of_one_evaluation_are_read_once(run, monkeypatch):
    """A search in a live report asks for all pages of an evaluation, whose file may have hundreds of megabytes."""
    monkeypatch.setattr("megatron_paint.report.samples.PAGE_BYTES", 10)
    reader, files = RunReader(run), []
    monkeypatch.setattr(
        "megatron_paint.report.reader.read_report", lambda file: files.append(file) or read_report(file)
    )
    pages = [reader.page(key, None) for key in ("e3_0", "e3_1", "e3_2")]
    assert [None if page is None else page["entries"][0]["problem"] for page in pages] == ["40+1-1?", "41+1-1?", None]
    assert len(files) == 1
    file = run / "eval" / "step_000003.json"
    file.write_text(file.read_text().replace("40+1-1?", "changed"))
    assert reader.page("e3_0", None)["entries"][0]["problem"] == "changed"


def test_the_name_of_a_benchmark_is_a_text(run):
    file = run / "eval" / "step_000003.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "benchmark": ["held_out"]}))
    data = read(run)
    assert [row["benchmark"] for row in data.summary["evaluations"]] == ["held_out", "['held_out']"]


def test_pages_of_answers_end_by_bytes(run, monkeypatch):
    monkeypatch.setattr("megatron_paint.report.samples.PAGE_BYTES", 10)
    assert answer_columns([read(run)])["page"] == ["e0_0", "e0_1", "e3_0", "e3_1"]
    reader = RunReader(run)
    assert len(reader.page("e3_1", None)["entries"]) == 1
    assert reader.page("e3_2", None) is None
    assert reader.page("e9_0", None) is None


def test_pieces_spell_the_response(run):
    reader = RunReader(run)
    texts = reader.texts(reader.read().tree)
    content = read_sample_file(run / "samples" / "step_000002.jsonl", 2)
    page = page_content(content.pages[0], texts)
    entry = page["entries"][1]
    assert entry["text"] == "41+8=51\n\\boxed{51}<|im_end|>"
    assert entry["lengths"] == [1, 1, 1, 1, 1, 1, 1, 1, 7, 1, 1, 1, 10]
    assert "counts" not in entry
    assert entry["values"]["divergence"][3] == 0.03
    assert entry["top"]["teacher"]["ids"][0] == [17, 15]
    assert page["tokens"] == {"15": "0", "16": "1", "17": "2"}
    assert entry["prompts"]["student"] == "41+8?<|im_end|>"
    assert entry["anchors"][0] == ["boxed", "52", False]


def test_pages_end_by_samples_and_by_bytes(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=1, samples=9)
    file = run / "samples" / "step_000001.jsonl"
    monkeypatch.setattr("megatron_paint.report.samples.PAGE_SAMPLES", 4)
    assert [len(page) for page in read_sample_file(file, 1).pages] == [4, 4, 1]
    longest = max(len(line) for line in file.read_text().split("\n"))
    monkeypatch.setattr("megatron_paint.report.samples.PAGE_BYTES", 2 * longest)
    assert [len(page) for page in read_sample_file(file, 1).pages] == [2, 2, 2, 2, 1]


# Damage: one notice for each kind, and everything else is shown.


def test_lines_that_are_cut_are_left_out(run):
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    samples = run / "samples" / "step_000003.jsonl"
    samples.write_text(samples.read_text()[:-20])
    data = read(run)
    assert data.summary["steps"] == [1, 2, 3]
    assert len(data.sample_rows) == 11
    assert data.summary["notices"] == [
        "metrics.jsonl: 1 line cannot be read and is left out",
        "samples/: 1 line cannot be read and is left out",
    ]


@pytest.mark.parametrize(
    ("name", "notice"),
    [
        ("config.yaml", "the settings are not known: Cannot read"),
        ("metrics.jsonl", "there are no curves: there is no metrics.jsonl"),
        ("logs/console.log", "warnings are not known: there is no console.log"),
        ("samples", "there are no samples: the run folder has no files in samples/"),
    ],
)
def test_what_is_missing_is_one_notice(run, name, notice):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = notices(run)
    assert found[0].startswith(notice)
    # Without settings the tokenizer is not known either.
    assert len(found) == (2 if name == "config.yaml" else 1)
    assert all("\n" not in line for line in found)


def test_a_run_without_anything_is_shown(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    assert len(notices(run)) == 4
    assert write_report([run], tmp_path / "report.html").samples == 0


@pytest.mark.parametrize("content", ["", "[1, 2]", "3", "\x00\xff", "a: [", '{"step": 1}'])
def test_files_of_other_content_are_no_traceback(run, content):
    for name in ("config.yaml", "metrics.jsonl", "eval/step_000003.json", "samples/step_000002.jsonl", "changes.jsonl"):
        (run / name).write_text(content, encoding="latin-1")
    written = write_report([run], run / "report.html")
    assert written.samples == 8
    assert any("eval/step_000003.json is left out" in notice for notice in written.notices)


def test_lines_of_other_types_are_no_traceback(run):
    odd = [
        {"id": 5, "response_text": "", "response_ids": []},
        {"id": "a", "response_text": "4", "response_ids": [19], "reveal": 3, "anchors": [7], "sampler_gap": "x"},
        {"id": "a", "response_text": "4", "response_ids": [19], "divergence": ["b"], "loss": "c", "selected": None},
        {"id": "a", "response_text": "4", "response_ids": ["19"]},
        {"id": "a", "response_text": "4", "response_ids": [10**30, -5]},  # no token has such an id
        {"id": "a", "response_text": "4", "response_ids": [19], "student_prompt_ids": ["x", None]},
        {"id": "a", "response_text": "4", "response_ids": [19], "teacher_prompt_ids": [1.5]},
        {"id": "a", "response_text": "4", "response_ids": [19], "teacher_prompt_ids": None},
        {"id": "a", "response_text": "4", "response_ids": [19], "reveal": {"shown_text": 4, "reference_text": [48]}},
    ]
    (run / "samples" / "step_000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    written = write_report([run], run / "report.html")
    assert written.samples == 13
    assert written.notices == ("samples/: 4 lines cannot be read and are left out",)
    entry = decode(read_block(written.file.read_text(), "report-pages")["r0_1_0"])["entries"][-1]
    assert entry["reveal"] == {"shown_text": "4", "reference_text": "[48]"}  # the search of the page needs texts


def test_numbers_that_no_browser_has_are_left_out(run):
    huge = "1" + 400 * "0"
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write(
            f'{{"step": 4, "loss": 1e999, "num_tokens": {huge}, "tokens_per_second": {huge}, "time/a_s": 1}}\n'
        )
        stream.write('{"step": 1e999, "loss": 1}\n')
    line = json.dumps(sample(2, 0)).replace('"divergence": [0.0,', '"divergence": [-1e999,')
    line = line.replace('"loss": 0.25', f'"loss": {huge}')
    (run / "samples" / "step_000002.jsonl").write_text(line + "\n")
    data = read(run)
    assert data.summary["metrics"]["loss"] == [1.0, 0.5, 0.333333, None]
    assert data.summary["tokens"] == 300
    assert data.summary["notices"] == ["metrics.jsonl: 1 line cannot be read and is left out"]
    assert sample_columns([data])["loss"][4] is None
    page = write_report([run], run / "report.html").file.read_text()
    read_block(page, "report-data")
    assert decode(read_block(page, "report-pages")["r0_2_0"])["entries"][0]["values"]["divergence"][:2] == [None, 0.01]


@pytest.mark.parametrize(
    "content",
    ['{"metrics": [], "answers": [], "step": 3, "benchmark": "a", "num_problems": 1, "samples_per_problem": 1}', "{}"],
)
def test_an_odd_evaluation_is_named(run, content):
    (run / "eval" / "step_000003.json").write_text(content)
    (notice,) = notices(run)
    assert notice.startswith("eval/step_000003.json is left out: ")
    data = read(run)
    assert (len(data.summary["evaluations"]), len(data.answer_rows)) == (1, 2)
    assert RunReader(run).page("e3_0", None) is None


def test_without_the_tokenizer_responses_have_no_tokens(run, tmp_path):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("examples/quickstart/model", "nowhere"))
    (notice,) = notices(run)
    assert notice.startswith("responses are shown without tokens: model.hf_path: there is no folder")
    assert not notice.endswith("in the folder in which the run was started")
    config.write_text(re.sub(r"hf_path: .*", "hf_path: models/nowhere", config.read_text()))
    (notice,) = notices(run)
    assert notice.endswith("or run this command in the folder in which the run was started")


def test_the_tokenizer_of_an_export_is_used_where_the_model_is_gone(run):
    config = run / "config.yaml"
    model = next(line for line in config.read_text().splitlines() if "hf_path" in line).partition(": ")[2]
    config.write_text(config.read_text().replace("examples/quickstart/model", "nowhere"))
    shutil.copytree(model, run / "hf" / "step_000003")
    assert notices(run) == []


def test_a_skipped_step_is_no_point_of_the_curves(run):
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 4, "skipped": "loss is not finite"}) + "\n")
    summary = read(run).summary
    assert summary["steps"] == [1, 2, 3]
    assert summary["skipped"] == [[4, "loss is not finite", 2]]


def start(when, after_step):
    return Start(when=when, host="h", command="c", after_step=after_step)


def test_the_start_of_a_change_and_of_a_skipped_step(monkeypatch):
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        starts = [start("2026-07-01 10:00:00 UTC", 0), start("2026-07-01 13:00:00 CEST", 2)]  # CEST is UTC + 2
        starts.append(start("2026-12-01 13:00:00 CET", 7))
        at = ["2026-07-01T09:00:00", "2026-07-01T10:59:59+00:00", "2026-07-01T11:00:00+00:00", "2026-12-01T12:00:00Z"]
        assert [start_at_time(starts, moment) for moment in at] == [1, 1, 2, 3]
        assert start_at_time(starts, "soon") == 3
        assert start_at_time([*starts, start("2026-12-02 13:00:00 PST", 9)], at[0]) == 4  # of an unknown time zone
        assert [start_at_step(starts, step) for step in (1, 2, 3, 7, 8)] == [1, 1, 2, 2, 3]
        assert (start_at_time([], at[0]), start_at_step([], 1)) == (0, 0)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_changes_of_settings_are_read(run):
    change = {"after_step": 2, "setting": "optimizer.lr", "old": 1e-5, "new": 2e-5, "time": "2026-11-29T23:50:00"}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n{")
    summary = read(run).summary
    assert summary["changes"] == [{name: str(value) for name, value in change.items()} | {"start": 2}]
    assert summary["notices"] == ["changes.jsonl: a line cannot be read and is left out"]


def test_files_that_did_not_change_are_read_once(run, monkeypatch):
    reader = RunReader(run)
    reader.read()
    opened = []
    monkeypatch.setattr("megatron_paint.report.reader.read_sample_file", lambda file, step: opened.append(step))
    monkeypatch.setattr("megatron_paint.report.evaluations.read_report", lambda file: opened.append(file))
    again = reader.read()
    assert (len(again.sample_rows), len(again.answer_rows)) == (12, 4)
    assert opened == []


def test_refusals(tmp_path, run):
    for path, reason in ((tmp_path / "nothing", "is no folder"), (tmp_path, "is not a run folder")):
        with pytest.raises(UserError, match=reason):
            write_report([path], tmp_path / "report.html")
    with pytest.raises(UserError, match="given twice"):
        write_report([run, tmp_path / "." / "run"], tmp_path / "report.html")


def test_runs_have_the_shortest_names_that_differ(tmp_path):
    assert names_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_a_sample_keeps_what_it_has():
    line = sample(1, 0)
    assert len(line["response_ids"]) == len(line["divergence"]) == 13


def test_lines_that_strict_json_refuses_are_read(run):
    """NaN and half of a character, which Python's json writes."""
    line = json.dumps(sample(2, 0)).replace('"loss": 0.25', '"loss": NaN').replace('"id": "', '"id": "\\ud800')
    assert "NaN" in line
    assert "\\ud800" in line
    (run / "samples" / "step_000002.jsonl").write_text(line + "\n")
    (entry,) = read_sample_file(run / "samples" / "step_000002.jsonl", 2).pages[0]
    assert entry["id"].startswith("\ud800")
    assert entry["loss"] is None
