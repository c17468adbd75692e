"""The report in a real browser: what a reader sees and does, on a screen, a phone and a keyboard."""

import json
import threading
from contextlib import contextmanager

import pytest

from megatron_paint.objectives.metric_table import METRICS
from megatron_paint.report.build import write_report
from megatron_paint.report.live import address_of, make_server
from megatron_paint.run.folder import RunFolder
from tests.report.browser import chromium, missing
from tests.report.made_run import group_sample, make_run, metrics, sample

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}"),
]
VIEWS = ("overview", "evaluations", "samples", "answers", "settings", "log")
SCRIPT = "<script>document.title='owned'</script>"
HOSTILE = f"<img src=x onerror=\"document.title='owned'\">{SCRIPT}&lt;b&gt;\u202eevil\x07\x1b[31m"
MEGABYTE = "<b>7</b>" * 131072
SET = (
    "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
    " one.dispatchEvent(new Event(arguments[2]));"
)
ENTER, ESCAPE, TAB, DOWN, RIGHT, END = "\ue007", "\ue00c", "\ue004", "\ue015", "\ue014", "\ue010"


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One run with 12 samples."""
    folder = tmp_path_factory.mktemp("report")
    return write_report([make_run(folder / "run")], folder / "report.html").file


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two runs, whose samples do not fit into the file."""
    folder = tmp_path_factory.mktemp("comparison")
    runs = [make_run(folder / "one", seed=7), make_run(folder / "two", steps=2)]
    return write_report(runs, folder / "report.html", budget=0).file


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """A run of GRPO: two steps of two groups with four responses."""
    folder = tmp_path_factory.mktemp("grpo")
    run = make_run(folder / "grpo", steps=0)
    for step in (1, 2):
        RunFolder(run).write_samples(step, [group_sample(step, number) for number in range(8)])
    return write_report([run], folder / "report.html").file


def show(browser, view):
    browser.run("location.hash = `#${arguments[0]}`", view)
    browser.wait(f"return document.body.dataset.view === '{view}'")


def is_clean(browser, *, asked):
    """No message on the console, and no request except for the files of the report itself."""
    assert browser.messages() == []
    found = browser.requests()
    assert found
    assert [address for address in found if not address.startswith(asked.as_uri())] == []


def listed(browser):
    return browser.texts("#view-samples .row .problem")


def test_curves_evaluations_settings_and_log(browser, report):
    browser.resize(1280, 900)
    browser.open(report)
    assert browser.text("h1") == "run"
    assert "step 3 of 3" in browser.text("#subtitle")
    titles = browser.texts("#curves h3")
    assert titles[:4] == ["Loss", "Overlap and reveal", "Entropy", "Gradient norm"]
    assert "Time by phase" in titles
    browser.wait("return document.querySelectorAll('#curves .grid canvas:not(.swatch)').length >= 6")
    # The numbers of a plot, for those who cannot see it.
    assert browser.run("return document.querySelector('#curves .plot').getAttribute('aria-label')") == (
        "Loss, nats a token: loss from 1 to 0.3333"
    )
    browser.run("document.querySelector('#curves .numbers').open = true")
    browser.wait("return document.querySelector('#curves .numbers table')")
    assert browser.texts("#curves .numbers td") == ["1", "1", "2", "0.5", "3", "0.3333"]
    assert "Of all steps: rollout 50 %, student 25 %, other 25 %." in browser.texts("#curves .note")
    show(browser, "evaluations")
    assert "75.0 [50.0, 100.0]" in browser.text("#view-evaluations table")
    assert "+50.0 [" in browser.text("#view-evaluations table")
    show(browser, "settings")
    assert "run.steps" in browser.text("#view-settings table")
    assert "optimizer.lr" not in browser.text("#view-settings table")
    show(browser, "log")
    kinds = browser.texts("#view-log .kind")
    assert kinds == ["start", "warning", "end", "start", "warning"]
    assert "the second warning" in browser.texts("#view-log td")[-1]
    is_clean(browser, asked=report.parent)


def test_the_log_has_changes_and_skipped_steps_under_their_start(browser, tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2, "skipped": "not finite"}\n')
    later = "\n==== 2026-11-30 08:00:00 UTC, node3: megatron-paint train paint.yaml\n"
    (run / "logs" / "console.log").open("a").write(later)
    change = {"after_step": 1, "setting": "optimizer.lr", "old": 1, "new": 2, "time": "2026-11-29T23:50:01+00:00"}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    browser.open(write_report([run], tmp_path / "report.html").file)
    show(browser, "log")
    kinds = browser.texts("#view-log .kind")
    assert kinds == ["start", "warning", "end", "skipped", "start", "changed", "warning", "start"]


def test_filters_sort_and_search(browser, report):
    browser.open(report)
    show(browser, "samples")
    assert browser.text(".total") == "12 samples"
    browser.run(
        "const set = (id, value, kind) => { const one = document.getElementById(id); one.value = value;"
        "one.dispatchEvent(new Event(kind)); };"
        "set('filter-step-from', 2, 'input'); set('filter-overlap-to', 0.5, 'input'); set('sort', 'loss', 'change');"
    )
    assert browser.text(".total") == "6 of 12 samples"
    assert browser.text(".filters summary") == "Filters (2)"
    # Loss (step + number) / 8: 2, 3, 3, 4, 4 and 5 eighths, the largest first; equal ones in the order of the run.
    assert listed(browser) == [f"problem-{number}" for number in (2, 2, 1, 1, 0, 0)]
    browser.run("document.querySelector('[aria-label=\"Order: descending\"]').click()")
    assert listed(browser) == [f"problem-{number}" for number in (0, 1, 0, 2, 1, 2)]
    browser.run(
        "const one = document.getElementById('filter-ended'); one.value = 'cut';one.dispatchEvent(new Event('change'));"
    )
    assert listed(browser) == ["problem-1", "problem-1"]
    browser.run("document.querySelector('.filters button').click()")
    assert browser.text(".total") == "12 samples"
    browser.run(
        "const one = document.getElementById('sort'); one.value = 'gap'; one.dispatchEvent(new Event('change'));"
    )
    assert browser.text(".row .where") == "step 1 · gap 1e-6"  # a value that no column has
    # The text search looks into the pages: 53 is in the responses of problem 3 and in the solution of problem 2.
    browser.run("document.getElementById('search').focus()")
    browser.press("5", "3")
    browser.wait("return document.querySelector('.total').textContent.startsWith('6 of')")
    assert sorted(set(listed(browser))) == ["problem-2", "problem-3"]
    is_clean(browser, asked=report.parent)


def test_a_curve_leads_to_the_samples_of_a_step(browser, report):
    browser.resize(1280, 900)
    browser.open(report)
    browser.wait("return document.querySelector('#curves .u-over')")
    click = (
        "const over = document.querySelector('#curves .u-over');"
        "const { left, top, width } = over.getBoundingClientRect();"
        "const at = (x) => ({ bubbles: true, clientX: left + x * width, clientY: top + 20, view: window });"
        "const send = (kind, x) => over.dispatchEvent(new MouseEvent(kind, at(x)));"
        "for (const x of arguments[0]) { send('mousemove', x); send('mousedown', x); send('mouseup', x);"
        " send('click', arguments[1] ?? x); } if (arguments[0].length > 1) send('dblclick', 0.5);"
    )
    browser.run(click, [0.5, 0.5])  # a double click ends a zoom
    browser.run(click, [0.5], 0.9)  # a zoom: pressed at the middle, released elsewhere
    browser.run("return new Promise((done) => setTimeout(done, 600))")
    assert browser.run("return document.body.dataset.view") == "overview"
    browser.run(click, [0.5])
    browser.wait("return document.body.dataset.view === 'samples'")
    assert browser.text(".total") == "4 of 12 samples"
    assert browser.run("return document.getElementById('filter-step-from').value") == "2"
    # Without a mouse: the numbers of the plot.
    show(browser, "overview")
    browser.run("document.querySelector('#curves .numbers').open = true")
    browser.wait("return document.querySelector('#curves .numbers table')")
    browser.run("document.querySelectorAll('#curves .numbers button')[2].click()")
    browser.wait("return document.body.dataset.view === 'samples'")
    assert browser.run("return document.getElementById('filter-step-to').value") == "3"
    browser.run("document.querySelector('.filters button').click()")
    is_clean(browser, asked=report.parent)


def test_a_sample_shows_what_was_hidden_found_and_selected(browser, report):
    browser.open(report)
    browser.run("location.hash = '#samples/0/2_0/1'")
    browser.wait("return document.querySelector('#sample .tokens')")
    assert browser.text("#sample h2") == "problem-1"
    assert browser.texts("#sample header .tag") == ["wrong", "cut off"]
    assert browser.text("#sample .solution").startswith("41+8=")
    assert browser.run("return document.querySelector('#sample .cut').textContent").endswith("52\n\\boxed{52}")
    assert browser.texts("#sample .cut mark.missing") == ["52", "52"]
    assert browser.texts("#sample .solution > mark.found") == ["41"]
    assert browser.texts("#sample .anchors li") == ["41\nnumber", "52\nboxed"]
    tokens = browser.texts("#sample .token[data-at]")
    assert len(tokens) == 13
    assert tokens[-1] == "<|im_end|>"
    assert browser.run(
        "return [...document.querySelectorAll('#sample .tokens .selected')].map((one) => one.dataset.at)"
    ) == ["2", "5"]
    # Divergence 0.01 a token up to 0.12, the end of the scale: 0.06 is half of it.
    classes = browser.run("return [...document.querySelectorAll('#sample .tokens .token')].map((one) => one.className)")
    assert classes[0] == "token"
    assert "heat-4" in classes[6].split()
    assert "heat-8" in classes[12].split()
    assert browser.texts("#sample details.prompt summary") == ["Prompt of the student", "Prompt of the teacher"]


def test_everything_works_with_the_keyboard(browser, report):
    browser.open(report)
    browser.press("3", "j", "j")
    browser.wait("return document.querySelector('#sample h2')?.textContent === 'problem-1'")
    browser.press("k")
    browser.wait("return document.querySelector('#sample h2')?.textContent === 'problem-0'")
    # The list: arrows choose, Enter leads into the sample, Escape leads back.
    browser.run("document.querySelector('.rows').focus()")
    browser.press(DOWN, DOWN, ENTER)
    browser.wait(
        "return document.activeElement.id === 'sample'"
        " && document.querySelector('#sample h2').textContent === 'problem-2'"
    )
    browser.press(ESCAPE)
    browser.wait("return document.activeElement.className === 'rows'")
    # The response is reached by Tab, and its tokens by arrows.
    browser.press(ENTER)
    for _ in range(8):
        browser.press(TAB)
        if browser.run("return document.activeElement.className") == "tokens":
            break
    browser.press(RIGHT, "m")
    assert "token 3 of 13, id 12, selected" in browser.text(".info")
    assert "divergence to the target\n0.02 nats" in browser.text(".info")
    assert browser.texts(".info caption") == ["Teacher would say", "Student would say"]
    assert browser.texts(".info table:first-child td") == ["2", "50.0 %", "0", "25.0 %"]
    browser.press("h")
    assert browser.run("return document.getElementById('quantity').value") == "student_entropy"
    browser.press("?")
    browser.wait("return document.getElementById('help').open")
    assert "next and previous sample" in browser.text("#help")
    assert browser.axe() == []
    browser.press(ESCAPE)
    browser.wait("return !document.getElementById('help').open")
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.press("j")  # types, and changes no sample
    assert browser.run("return document.getElementById('search').value") == "j"
    is_clean(browser, asked=report.parent)


def test_several_runs_and_samples_beside_the_file(browser, comparison):
    browser.open(comparison)
    assert browser.texts("#view-overview .run") == ["one", "two"]
    assert browser.texts("#curves .grid:first-child figure:first-child .legend li")[0].startswith("one")
    browser.run("document.getElementById('run-0').click()")
    assert len(browser.texts("#curves .grid:first-child figure:first-child .legend li")) == 1
    show(browser, "settings")
    assert "run.seed" in browser.text("#view-settings table")
    assert "run.steps" not in browser.text("#view-settings table")
    show(browser, "samples")
    browser.press("j")
    browser.wait("return document.querySelector('#sample .tokens')")
    assert browser.text("#sample .where") == "one, step 1, sample 0"
    asked = browser.requests()
    assert [address.rpartition("/")[2] for address in asked if "report_files" in address] == ["r0_1_0.js"]
    assert browser.messages() == []


def test_lines_of_many_runs_and_of_all_phases_differ(browser, report):
    browser.open(report)
    lines = browser.run("return Array.from({length: 48}, (_, index) => JSON.stringify(paint.runLine(index)))")
    assert len(set(lines)) == 48
    phases = [key for key in METRICS if key.startswith("time/")]
    colors = browser.run("return Array.from({length: arguments[0]}, (_, at) => paint.lineColor(at))", len(phases) + 1)
    assert len(set(colors)) == len(phases) + 1  # the last one is `other`


def test_many_runs_have_one_series_in_a_plot(browser, tmp_path):
    runs = [make_run(tmp_path / f"run_{number}", steps=1) for number in range(4)]
    browser.open(write_report(runs, tmp_path / "report.html").file)
    titles = browser.texts("#curves .grid:first-child h3")
    assert titles[:5] == [
        "Loss",
        "Overlap and reveal: overlap",
        "Overlap and reveal: reveal",
        "Entropy: student",
        "Entropy: teacher",
    ]
    browser.run("document.getElementById('run-3').click()")
    assert browser.texts("#curves .grid:first-child h3")[:3] == ["Loss", "Overlap and reveal", "Entropy"]


def test_neighbouring_numbers_of_an_axis_differ(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    for step, value in enumerate((1.0412, 1.0437, 1.0551), start=1):
        RunFolder(run).append_metrics({"step": step, "loss": value})
    browser.open(write_report([run], tmp_path / "report.html").file)
    browser.wait("return document.querySelector('#curves .u-wrap')")
    drawn = browser.run(
        "const drawn = []; const draw = CanvasRenderingContext2D.prototype.fillText;"
        "CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) { drawn.push(text);"
        " draw.call(this, text, ...rest); }; paint.drawPlots();"
        "return new Promise((resolve) => setTimeout(() => resolve(drawn), 100));"
    )
    values = [text for text in drawn if "." in text]
    assert len(values) == len(set(values)) >= 4
    assert "step" in drawn  # the name of the other axis


def test_a_page_that_is_gone_is_named(browser, comparison):
    page = comparison.parent / "report_files" / "r1_2_0.js"
    text = page.read_text()
    page.unlink()
    try:
        browser.open(comparison)
        browser.run("location.hash = '#samples/1/2_0/0'")
        browser.wait("return document.querySelector('#sample [role=alert]')")
        assert "report_files/r1_2_0.js cannot be read: keep this folder beside the report" in browser.text("#sample")
    finally:
        page.write_text(text)


@pytest.mark.parametrize(
    ("solution", "says"),
    [
        ("none", "The teacher saw no solution."),
        ("reference_free", "The teacher saw no solution. Its prompt was in thinking mode."),
    ],
)
def test_a_teacher_that_saw_no_solution(browser, tmp_path, solution, says):
    """One plain line, and no empty text with a legend."""
    run = make_run(tmp_path / "run", steps=1)
    empty = {"shown_text": "", "reference_text": "", "shown_tokens": 0, "total_tokens": 0, "share": 0.0}
    line = sample(1, 0) | {"anchors": [], "reveal": empty | {"solution": solution}}
    (run / "samples" / "step_000001.jsonl").write_text(json.dumps(line) + "\n")
    browser.open(write_report([run], tmp_path / "report.html").file)
    browser.run("location.hash = '#samples/0/1_0/0'")
    browser.wait("return document.querySelector('#sample .tokens')")
    assert says in browser.texts("#sample .note")
    assert browser.run("return document.querySelectorAll('#sample .key .cut, #sample .reveal-bar').length") == 0
    is_clean(browser, asked=tmp_path)


def test_a_response_of_grpo_without_an_advantage_is_left_out(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    none = {"overlap": None, "reveal": None, "anchors": [], "selected": []}
    lines = [sample(1, number) | none | {"advantage": number - 1.0} for number in range(3)]
    (run / "samples" / "step_000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    browser.open(write_report([run], tmp_path / "report.html").file)
    browser.run("location.hash = '#samples/0/1_0/1'")
    browser.wait("return document.querySelector('#sample .tokens')")
    assert browser.texts("#sample header .tag") == ["wrong", "cut off", "left out"]
    assert "its reward is the mean of its group" in browser.text("#sample .sample-facts")
    assert browser.texts("#sample h3") == ["Response", "Solution", "Prompts"]  # and no anchors of what nobody was shown
    browser.run(
        "const one = document.getElementById('filter-trained'); one.value = 'no';"
        "one.dispatchEvent(new Event('change'));"
    )
    assert listed(browser) == ["problem-1"]
    is_clean(browser, asked=tmp_path)


def test_a_group_of_grpo_shows_its_responses(browser, grpo):
    """Eight responses to two problems in each of two steps: the first of a group is right, with the advantage 1.5."""
    browser.open(grpo)
    browser.run("location.hash = '#samples/0/2_0/5'")
    browser.wait("return document.querySelector('#sample .group')")
    assert browser.text("#sample .group .unit") == "4 responses to this problem in this step, 1 right"
    assert browser.texts("#sample .group th") == ["Sample", "", "Reward", "Advantage", "Tokens"]
    assert browser.texts("#sample .group td")[:10] == [
        *("0", "right", "1.00", "1.50", "13"),
        *("1", "wrong\ncut off", "0.00", "-0.50", "13"),
    ]
    assert browser.texts("#sample .group [aria-current]") == ["1"]
    assert "Reward\n0.00\nAdvantage\n-0.50\n" in browser.text("#sample .sample-facts")
    # A click opens another response, and so does the key; the focus stays at the link.
    browser.run("const one = document.querySelectorAll('#sample .group a')[3]; one.focus(); one.click()")
    browser.wait("return document.querySelector('#sample .where').textContent === 'step 2, sample 3'")
    assert browser.run("return document.activeElement.textContent") == "3"
    assert browser.run("return document.activeElement.getAttribute('aria-current')") == "true"
    assert browser.text(".row[aria-selected=true] .problem") == "problem-1"
    browser.press("g")
    browser.wait("return document.querySelector('#sample .where').textContent === 'step 2, sample 0'")
    assert browser.text("#sample h2") == "problem-1"
    is_clean(browser, asked=grpo.parent)


def test_samples_of_grpo_by_reward_and_advantage(browser, grpo):
    browser.open(grpo)
    show(browser, "samples")
    assert browser.texts("#view-samples .heads .figures span") == ["reward", "advantage", "loss"]
    assert browser.texts(".row:first-child .figures span")[1:] == ["1.00", "1.50", "0.125"]
    browser.run(SET, "sort", "advantage", "change")
    assert browser.texts(".row .where")[:4] == ["step 1 · 13 tokens"] * 2 + ["step 2 · 13 tokens"] * 2
    assert listed(browser)[:4] == ["problem-0", "problem-1"] * 2
    browser.run(SET, "filter-reward-to", "0.5", "input")
    assert browser.text(".total") == "12 of 16 samples"
    browser.run(SET, "filter-advantage-from", "0", "input")
    assert browser.text(".total") == "0 of 16 samples"


def test_answers_of_evaluations(browser, report):
    """Two problems with two answers each: one of four answers is right at step 0, three are at step 3."""
    browser.open(report)
    show(browser, "answers")
    assert browser.texts("#view-answers .row .problem") == ["held-0", "held-1"] * 2
    assert browser.texts("#view-answers .heads .figures span") == ["right", "tokens"]
    assert browser.texts("#view-answers .row .figures span:nth-child(2)") == ["1/2", "0/2", "2/2", "1/2"]
    assert browser.texts("#view-answers .row .tag") == [
        *("cut off", "none right", "cut off", "all right", "cut off", "cut off"),
    ]
    browser.run(SET, "answer-filter-right", "none", "change")
    assert browser.text("#view-answers .total") == "1 of 4 problems of evaluations"
    browser.run(SET, "answer-filter-right", "", "change")
    browser.run(SET, "answer-filter-changed", "better", "change")
    assert browser.texts("#view-answers .row .where") == ["step 3 · held_out"] * 2
    browser.run("document.querySelector('#view-answers .filters button').click()")
    assert browser.text("#view-answers .total") == "4 problems of evaluations"
    browser.run(SET, "answer-sort", "share", "change")
    assert browser.texts("#view-answers .row .problem") == ["held-1", "held-0", "held-1", "held-0"]
    browser.run("document.querySelector('#view-answers .filters').open = true")
    assert browser.texts("#view-answers fieldset.range legend") == ["Step", "Share right", "Tokens"]
    assert browser.texts("#answer-filter-greedy, #answer-filter-benchmark") == []  # no greedy answers, one benchmark
    # The search looks into problems, reference answers and answers.
    for text, found in (("41+1", ["held-1"] * 2), ("no such text", []), ("boxed{0}", ["held-0"] * 2)):
        browser.run(SET, "answer-search", text, "input")
        browser.wait(f"return document.querySelector('#view-answers .total').textContent.startsWith('{len(found)} of')")
        if found:
            assert browser.texts("#view-answers .row .problem") == found
    is_clean(browser, asked=report.parent)


def test_the_answers_to_a_problem_over_the_run(browser, report):
    browser.open(report)
    show(browser, "evaluations")
    browser.run("document.querySelector('#view-evaluations [aria-label=\"answers of step 3\"]').click()")
    browser.wait("return document.body.dataset.view === 'answers'")
    assert browser.text("#view-answers .total") == "2 of 4 problems of evaluations"
    browser.run("document.querySelector('#view-answers .filters button').click()")
    # With the keyboard alone: the view, the list, the details, the next evaluation, and back.
    browser.run("document.activeElement.blur()")  # the search
    browser.press("1", "4", "j", "j")
    browser.wait("return document.querySelector('#answer h2')?.textContent === 'held-1'")
    assert browser.text("#answer header .where") == "step 0 on held_out"
    facts = dict(zip(browser.texts("#answer .sample-facts dt"), browser.texts("#answer .sample-facts dd"), strict=True))
    assert facts == {
        "Right": "0 of 2",
        "Reference answer": "41",
        "Since the first evaluation": "0 points",
        "Cut off": "1 of 2",
        "Mean tokens": "6",
    }
    assert browser.texts("#answer .text")[0] == "41+1-1?"
    summaries = [" ".join(text.split()) for text in browser.texts("#answer .answer summary")]
    assert summaries == ["Answer 0 wrong 2 · 5 tokens", "Answer 1 wrong cut off 3 · 6 tokens"]
    assert browser.texts("#answer .answer .text") == ["so it is \\boxed{2}", "so it is \\boxed{3}"]
    assert browser.texts("#answer .group th") == ["Step", "", "Right", "Change, points", "Mean tokens"]
    cells = [" ".join(text.split()) for text in browser.texts("#answer .group td")]
    assert cells == ["0", "none right cut off", "0/2", "0", "6", "3", "cut off", "1/2", "+50", "6"]
    browser.press("g")
    browser.wait("return document.querySelector('#answer .where').textContent === 'step 3 on held_out'")
    assert browser.text("#answer h2") == "held-1"
    assert browser.texts("#answer .answer .tag") == ["right", "wrong", "cut off"]
    assert browser.text("#view-answers .row[aria-selected=true] .where") == "step 3 · held_out"
    browser.press(ESCAPE)
    browser.wait("return document.activeElement.matches('#view-answers .rows')")
    browser.press(ENTER)
    browser.wait("return document.activeElement.id === 'answer'")
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "answer-search"
    is_clean(browser, asked=report.parent)


def test_answers_without_lengths_are_shown(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    for file in (run / "eval").iterdir():
        content = json.loads(file.read_text())
        answers = [{**answer, "num_tokens": 0} for answer in content["answers"]]
        file.write_text(json.dumps({**content, "answers": answers}))
    browser.open(write_report([run], tmp_path / "report.html").file)
    show(browser, "answers")
    browser.run("document.querySelector('#view-answers .row').click()")
    browser.wait("return document.querySelector('#answer header')")
    assert browser.texts("#answer .callout") == []
    assert len(browser.texts("#answer .answer")) == 2


def test_a_run_without_evaluations_has_no_answers(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    for file in (run / "eval").iterdir():
        file.unlink()
    browser.open(write_report([run], tmp_path / "report.html").file)
    show(browser, "answers")
    assert browser.text("#answer") == "The runs have no evaluation with answers."
    browser.press("j", "g", "k")
    is_clean(browser, asked=tmp_path)


def test_what_no_sample_has_is_not_shown(browser, report, grpo, tmp_path):
    """A run of GRPO has no overlap, reveal and selected tokens; beside a run of PAINT they are shown."""
    ranges = "#view-samples fieldset.range legend"
    browser.open(report)
    show(browser, "samples")
    browser.run("document.querySelector('.filters').open = true")
    assert browser.texts(ranges) == ["Step", "Overlap", "Reveal", "Loss", "Tokens"]
    assert browser.texts("#view-samples .heads .figures span") == ["overlap", "reveal", "loss"]
    browser.run("location.hash = '#samples/0/2_0/1'")
    browser.wait("return document.querySelector('#sample .tokens')")
    assert browser.texts("#sample .group") == []  # one response to each problem
    browser.open(grpo)
    show(browser, "samples")
    browser.run("document.querySelector('.filters').open = true")
    assert browser.texts(ranges) == ["Step", "Reward", "Advantage", "Loss", "Tokens"]
    sorts = browser.texts("#sort option")
    assert sorts == ["step", "loss", "reward", "advantage", "tokens", "sampler gap", "problem"]
    browser.run("location.hash = '#samples/0/1_0/1'")
    browser.wait("return document.querySelector('#sample .tokens')")
    assert browser.texts("#sample .sample-facts dt")[:4] == ["Reward", "Advantage", "Loss", "Tokens"]
    assert browser.texts("#quantity option") == ["entropy of the student"]
    assert browser.texts("#sample .mark-note") == []
    both = write_report([make_run(tmp_path / "run"), grpo.parent / "grpo"], tmp_path / "report.html").file
    browser.open(both)
    show(browser, "samples")
    browser.run("document.querySelector('.filters').open = true")
    assert browser.texts(ranges) == ["Step", "Overlap", "Reveal", "Reward", "Advantage", "Loss", "Tokens"]
    browser.run("location.hash = '#samples/1/1_0/1'")
    browser.wait("return document.querySelector('#sample .group')")
    assert "Overlap" not in browser.text("#sample .sample-facts")  # this run has none
    assert browser.texts("#quantity option") == ["entropy of the student"]
    for width in (360, 1280):
        browser.resize(width, 800)
        browser.run("paint.viewers.samples.close()")
        inside = (
            "return [...document.querySelectorAll('.row')].every((row) => row.scrollHeight <= row.clientHeight + 1"
            " && [...row.querySelectorAll('.figures span:not(.hidden-text)')].every((one) =>"
            " one.getBoundingClientRect().left >= row.getBoundingClientRect().left))"
        )
        assert browser.texts(".row .figures")
        assert browser.run(inside), width
        heads, row = (
            browser.run(
                "return [...document.querySelectorAll(`${arguments[0]} .figures span:not(.hidden-text)`)]"
                ".map((one) => one.getBoundingClientRect().right)",
                place,
            )
            for place in (".heads", ".row:first-child")
        )
        assert heads == row
    browser.resize(1280, 900)
    is_clean(browser, asked=tmp_path)


def test_a_response_without_values_of_its_tokens_has_no_colours(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    line = group_sample(1, 0)
    del line["student_entropy"]
    RunFolder(run).write_samples(1, [line])
    browser.open(write_report([run], tmp_path / "report.html").file)
    browser.run("location.hash = '#samples/0/1_0/0'")
    browser.wait("return document.querySelector('#sample .tokens')")
    assert browser.texts("#quantity") == []
    browser.run("document.querySelector('#sample .tokens').focus()")
    browser.press(RIGHT, "h")
    assert "token 2 of 13" in browser.text(".info")
    is_clean(browser, asked=tmp_path)


def test_hostile_text_is_text(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=1, log=f"12:00:00  warning: {HOSTILE}\n")
    odd = {"id": HOSTILE, "response_text": HOSTILE, "anchors": [{"kind": HOSTILE, "text": HOSTILE, "found": True}]}
    odd["reveal"] = {
        "shown_text": HOSTILE,
        "reference_text": HOSTILE * 2,
        "shown_tokens": 1,
        "total_tokens": 2,
        "share": 0.5,
    }
    long = sample(1, 1) | {"id": "long", "response_text": MEGABYTE, "response_ids": [22] * 1_000_000, "divergence": []}
    lines = [sample(1, 0) | odd | {"response_ids": [10**9, 15]}, long]
    (run / "samples" / "step_000001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated = json.loads((run / "eval" / "step_000003.json").read_text())
    evaluated["benchmark"] = HOSTILE
    for problem in evaluated["problems"]:
        problem |= {"id": HOSTILE + problem["id"], "problem": HOSTILE, "answer": HOSTILE}
    for answer in evaluated["answers"]:
        answer |= {"problem_id": HOSTILE + answer["problem_id"], "response_text": HOSTILE, "extracted": HOSTILE}
        answer |= {"outcome": HOSTILE, "error": HOSTILE, "domain": HOSTILE}
    (run / "eval" / "step_000003.json").write_text(json.dumps(evaluated))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("train.jsonl", "'<img src=x onerror=1>'"))
    report = write_report([run], tmp_path / "report.html").file
    browser.open(report)
    title = browser.run("return document.title")
    browser.run("location.hash = '#samples/0/1_0/0'")
    browser.wait("return document.querySelector('#sample .tokens, #sample .text')")
    browser.run("location.hash = '#answers/0/e3_0/0'")
    browser.wait("return document.querySelector('#answer .answer')")
    assert f"{SCRIPT}&lt;b&gt;" in browser.text("#answer .answer summary")
    assert browser.texts("#answer .text")[0].startswith("<img src=x onerror")
    for view in VIEWS:
        show(browser, view)
    assert browser.run("return document.querySelectorAll('main img, main b, main script').length") == 0
    assert browser.run("return document.title") == title
    show(browser, "samples")
    browser.wait("return document.querySelector('#sample h2').textContent.startsWith('<img')")
    heading = browser.text("#sample h2")
    assert f"{SCRIPT}&lt;b&gt;" in heading
    assert heading.endswith("\u27e8202E\u27e9evil\u2407\u241b[31m")  # control characters have a shape
    # A million tokens: the first ones at once, all of them on request.
    browser.run("location.hash = '#samples/0/1_1/0'")
    browser.wait("return document.querySelector('#sample h2').textContent === 'long'")
    assert browser.run("return document.querySelectorAll('#sample .tokens .token').length") == 6000
    assert "Show all 1,000,000 tokens" in browser.text("#sample")
    is_clean(browser, asked=tmp_path)


def test_curves_of_extreme_numbers(browser, tmp_path):
    """A logarithmic axis over hundreds of powers of ten would take gigabytes."""
    run = make_run(tmp_path / "run", steps=0)
    folder = RunFolder(run)
    for step, value in enumerate((5e-324, 1e-300, 1e-3, 1e300, 1.7e308), start=1):
        folder.append_metrics(metrics(step) | {"loss": value, "grad_norm": value, "own/metric": -value})
    browser.open(write_report([run], tmp_path / "report.html").file)
    browser.wait("return document.querySelectorAll('#curves .u-wrap').length >= 5")
    assert browser.run("return performance.memory.usedJSHeapSize") < 500e6
    assert browser.messages() == []
    browser.run("document.querySelector('#curves figure:first-child .numbers').open = true")
    browser.wait("return document.querySelector('#curves .numbers table')")
    assert browser.texts("#curves .numbers td")[1::2] == ["4.94e-324", "1e-300", "0.001", "1e300", "1.7e308"]


def open_answer(browser):
    browser.run("document.querySelector('#view-answers .filters').open = true")
    browser.run("document.querySelector('#view-answers .row').click()")
    browser.wait("return document.querySelector('#answer .answer')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, report, comparison, grpo, scheme):
    browser.prefer(scheme)
    browser.resize(1280, 900)
    try:
        for file in (report, comparison, grpo):
            browser.open(file)
            for view in VIEWS:
                show(browser, view)
                if view == "samples":
                    browser.run("document.querySelector('.filters').open = true")
                    browser.press("j")
                    browser.wait("return document.querySelector('#sample .tokens')")
                    browser.run("document.querySelectorAll('#sample details').forEach((one) => { one.open = true; })")
                    browser.run("document.querySelector('#sample .tokens').focus()")
                if view == "answers":
                    open_answer(browser)
                assert browser.axe() == [], (file, view)
        dark = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert dark == {"light": "rgb(248, 248, 246)", "dark": "rgb(18, 20, 23)"}[scheme]
    finally:
        browser.prefer("light")


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_is_wider_than_the_screen(browser, report, comparison, grpo, width):
    browser.resize(width, 740)
    try:
        for file in (report, comparison, grpo):
            browser.open(file)
            for view in VIEWS:
                show(browser, view)
                assert browser.run("return document.documentElement.scrollWidth") <= width, (file, view)
            show(browser, "answers")
            open_answer(browser)
            assert browser.run("return document.documentElement.scrollWidth") <= width
            show(browser, "samples")
            browser.run("document.querySelector('.filters').open = true")
            assert browser.run("return document.documentElement.scrollWidth") <= width
            browser.run("document.querySelector('.row').click()")
            browser.wait("return document.querySelector('#sample .tokens')")
            browser.run("document.querySelectorAll('#sample details').forEach((one) => { one.open = true; })")
            browser.run("document.querySelector('#sample .tokens').focus()")
            assert browser.run("return document.documentElement.scrollWidth") <= width
            if width == 360:
                assert browser.run("return getComputedStyle(document.querySelector('.sidebar')).display") == "none"
                browser.run("document.querySelector('.back').click()")
                assert browser.run("return getComputedStyle(document.querySelector('#sample')).display") == "none"
    finally:
        browser.resize(1280, 900)


def test_a_phone_shows_every_column_of_a_table(browser, report, comparison):
    browser.resize(360, 740)
    inside = (
        "return [...document.querySelectorAll(`#view-${arguments[0]} .stack td`)].every((one) => {"
        " const { left, right, height } = one.getBoundingClientRect();"
        " return left >= 0 && right <= 360 && height > 0 && one.scrollWidth <= one.clientWidth; })"
    )
    try:
        for file in (report, comparison):
            browser.open(file)
            for view in ("overview", "evaluations", "settings", "log"):
                show(browser, view)
                assert browser.texts(f"#view-{view} .stack td")
                assert browser.run(inside, view), (file, view)
                assert browser.axe() == [], (file, view)
    finally:
        browser.resize(1280, 900)


def test_paper_shows_what_the_screen_shows(browser, report):
    """Plots as wide as the paper and not cut, complete tables, and the sample with its colours explained."""
    browser.open(report)
    browser.wait("return document.querySelector('#curves canvas:not(.swatch)')")
    browser.prints(True)
    try:
        widths = browser.run(
            "const plot = document.querySelector('#curves .plot'); const wrap = plot.querySelector('.u-wrap');"
            "wrap.style.width = '2000px';"  # as it was on a wide screen
            "return [plot, plot.querySelector('canvas')].map((one) => one.getBoundingClientRect().width);"
        )
        assert widths[0] == widths[1]
        style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        assert browser.run(style, "#view-overview .scroll", "overflow-x") == "visible"
        assert browser.run(style, "#view-overview .panel", "break-inside") == "auto"  # it may be longer than a page
        browser.resize(700, 900)
        browser.run("location.hash = '#samples/0/1_0/1'")
        browser.wait("return document.querySelector('#sample .tokens')")
        browser.run("document.querySelector('.back').click()")  # back in the list, the sample is still what is printed
        assert browser.run(style, "#sample", "display") == "block"
        assert browser.run(style, "#sample .controls", "display") == "flex"
        browser.run("location.hash = '#answers/0/e3_0/1'")
        browser.wait("return document.querySelector('#answer .answer')")
        browser.run("for (const one of document.querySelectorAll('#answer details')) one.open = false")
        browser.run("dispatchEvent(new Event('beforeprint'))")
        assert browser.run("return [...document.querySelectorAll('#answer details')].every((one) => one.open)")
        browser.run("dispatchEvent(new Event('afterprint'))")
        assert browser.run(style, "#answer", "display") == "block"
        assert browser.run(style, "#view-answers .sidebar", "display") == "none"
    finally:
        browser.prints(False)
        browser.resize(1280, 900)


def test_the_theme_can_be_chosen(browser, report):
    browser.open(report)
    colors = []
    for _ in range(3):
        browser.press("t")
        colors.append((browser.text("#theme"), browser.run("return getComputedStyle(document.body).backgroundColor")))
    assert colors == [
        ("Theme: light", "rgb(248, 248, 246)"),
        ("Theme: dark", "rgb(18, 20, 23)"),
        ("Theme: system", "rgb(248, 248, 246)"),
    ]
    try:
        browser.prefer("dark")
        browser.wait("return getComputedStyle(document.body).backgroundColor === 'rgb(18, 20, 23)'")
        assert browser.text("#theme") == "Theme: system"
    finally:
        browser.prefer("light")


@contextmanager
def serving(runs):
    server = make_server(runs)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_live_report_follows_its_run(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    with serving([run]) as server:
        browser.open(address_of(server))
        assert "step 2 of 3" in browser.text("#subtitle")
        browser.press("3", "j")
        browser.wait("return document.querySelector('#sample .tokens')")
        folder = RunFolder(run)
        folder.append_metrics(metrics(3))
        folder.write_samples(3, [sample(3, 0)])
        browser.wait("return document.querySelector('#subtitle').textContent.includes('step 3 of 3')")
        assert browser.text(".total") == "9 samples"
        assert browser.text("#sample h2") == "problem-0"  # the reader keeps his place
        show(browser, "overview")
        assert browser.text("#curves .legend .value") == "0.3333"
        assert browser.messages() == []
        origins = {address.split("/")[2] for address in browser.requests()}
        assert origins == {f"127.0.0.1:{server.server_port}"}


def test_keys_in_one_moment_are_followed_in_order(browser, report):
    """The second key is meant for the view of the first one, whose address is not followed yet."""
    browser.open(report)
    browser.run(
        "for (const key of ['4', 'j']) document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))"
    )
    browser.wait("return document.querySelector('#answer .answer')")
    assert browser.run("return document.body.dataset.view") == "answers"


def test_a_live_report_shows_new_evaluations(browser, tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    later = run / "eval" / "step_000003.json"
    text = later.read_text()
    later.unlink()
    with serving([run]) as server:
        browser.open(address_of(server))
        browser.press("4", "j")
        browser.wait("return document.querySelector('#answer .answer')")
        assert browser.texts("#answer .group") == []  # one evaluation
        later.write_text(text)
        browser.wait("return document.querySelector('#view-answers .total').textContent.startsWith('4 ')")
        assert browser.text("#answer h2") == "held-0"  # the reader keeps his place
        browser.press("j")
        browser.wait("return document.querySelector('#answer h2').textContent === 'held-1'")
        assert browser.texts("#answer .group a") == ["0", "3"]
        assert browser.messages() == []


def test_new_samples_of_one_run_leave_the_reader_of_another_in_his_place(browser, tmp_path):
    runs = [make_run(tmp_path / "first", steps=2), make_run(tmp_path / "second", steps=2)]
    with serving(runs) as server:
        browser.open(address_of(server))
        show(browser, "samples")
        browser.run("document.getElementById('search').focus()")
        browser.press(*"problem-2")
        browser.wait("return document.querySelector('.total').textContent === '4 of 16 samples'")
        browser.run(
            "[...document.querySelectorAll('.row')].find((one) => one.textContent.includes('second · step 1')).click()"
        )
        browser.wait("return document.querySelector('#sample .tokens')")
        assert browser.text("#sample .where") == "second, step 1, sample 0"
        folder = RunFolder(runs[0])
        folder.append_metrics(metrics(3))
        folder.write_samples(3, [sample(3, 0), sample(3, 2)])
        browser.wait("return document.querySelector('.total').textContent === '5 of 18 samples'")
        assert listed(browser) == ["problem-2"] * 5
        assert browser.text(".row[aria-selected=true] .where").startswith("second · step 1")
        browser.run("document.querySelector('#sample .steps button:last-child').click()")
        browser.wait("return !document.querySelector('#sample .where').textContent.includes('second, step 1,')")
        rows = browser.texts(".row .where")
        following = browser.text("#sample .where").replace(", step", " · step").removesuffix(", sample 0")
        at = [row.startswith("second · step 1") for row in rows].index(True)
        assert rows[at + 1].startswith(following)
        assert browser.messages() == []
