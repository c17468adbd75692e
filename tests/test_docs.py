"""README and docs/ say what is true: links, paths, commands, settings, code and drawings."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

import megatron_paint
from megatron_paint.cli.main import make_parser, parse
from megatron_paint.config import describe
from megatron_paint.config.load import load_settings
from megatron_paint.config.settings import DataSettings
from megatron_paint.data.problems import load_problems
from megatron_paint.grading.grade import GradingPool
from megatron_paint.objectives.metric_table import METRICS
from megatron_paint.objectives.metrics import CLIP_LIMIT, CLIP_STEPS
from megatron_paint.planning.memory import make_plan
from megatron_paint.run.learning_watch import SIGNS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_paint"
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("megatron_paint", "docs", "tests", "examples", "tools", "benchmarks")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEW_FILE = re.compile(r"^```\w+ file=(\S+)", re.MULTILINE)  # a page may show a file that a reader is to add
PATH = re.compile(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
PYTHON_FILE = re.compile(r"`([\w./-]+\.py)`")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]+\b")  # such as examples/MODEL/paint.yaml
LINK = re.compile(r"\]\(([^)\s]+)\)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages."""
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = FENCE.sub("", page.read_text())
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = next(n for n in range(len(found) + 1) if (f"{name}-{n}" if n else name) not in found)
        found.add(f"{name}-{number}" if number else name)
    return found


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `megatron-paint` command in a page's shell blocks."""
    found = []
    for line in "".join(blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        names = [index for index, word in enumerate(words) if Path(word).name == "megatron-paint"]
        found += [list(takewhile(lambda word: word != ">", words[index + 1 :])) for index in names]
    return found


@pages
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pages
def test_paths_exist(page):
    text = page.read_text()
    added = set(NEW_FILE.findall(text))
    for found in PATH.findall(text):
        path = found.rstrip(".-")
        if path in added or PLACEHOLDER.search(path):
            continue
        exists = any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()
        assert exists, f"{page.name} names {path}"


@pages
def test_python_files_exist(page):
    """Also those that are named from the package's folder on, or by their last name alone."""
    text = page.read_text()
    for path in set(PYTHON_FILE.findall(text)) - set(NEW_FILE.findall(text)):
        known = (ROOT / path).exists() or any(file.match(f"**/{path}") for file in PACKAGE.rglob("*.py"))
        known = known or any(file.match(f"**/{path}") for file in (ROOT / "tests").rglob("*.py"))
        assert known, f"{page.name} names {path}"


@pages
def test_lists_are_lists_on_the_site_too(page):
    """Python-Markdown wants an empty line before a list, and four spaces before a list in a list. Code hosts do not."""
    before = ""
    for line in FENCE.sub("", page.read_text()).splitlines():
        item = re.match(r"( *)(?:[*-]|\d+\.) ", line)
        assert not item or len(item[1]) in (0, 4), f"{page.name}: {line}"
        follows = not before or before.startswith("  ") or re.match(r" *(?:[*-]|\d+\.) ", before)
        assert not item or follows, f"{page.name}: {line}"
        before = line


@pages
def test_commands_parse(page):
    for arguments in commands(page):
        try:
            parse(arguments)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: megatron-paint {shlex.join(arguments)}: {error}") from error


@pages
def test_commands_in_the_text_exist(page):
    known = next(action.choices for action in make_parser()._actions if action.choices)
    for name in re.findall(r"`megatron-paint ([a-z]+)", page.read_text()):
        assert name in known, f"{page.name}: megatron-paint {name}"


@pages
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    named = re.findall(r"`make ([\w-]+)", text)
    named += re.findall(r"^make ([\w-]+)", "".join(blocks(page, "bash", "sh")), re.MULTILINE)
    assert set(named) <= targets, f"{page.name}: {set(named) - targets}"


def test_the_readme_s_commands_are_found():
    """The parser of the pages itself: what it finds must not dwindle without a notice."""
    found = {" ".join(arguments[:2]) for arguments in commands(README)}
    assert {"launch slurm", "convert to-hf", "evaluate compare", "inspect samples", "doctor"} <= found
    assert len(PATH.findall(README.read_text())) > 20


def test_the_readme_s_settings_load(tmp_path):
    (text,) = blocks(README, "yaml")
    (tmp_path / "settings.yaml").write_text(text)
    settings = load_settings(tmp_path / "settings.yaml")
    assert (settings.objective.name, settings.model.lora.rank, settings.run.resume) == ("paint", 64, "auto")


def test_the_readme_s_problem_loads(tmp_path):
    (line,) = blocks(README, "json")
    assert line.count("\n") == 1
    (tmp_path / "problems.jsonl").write_text(line)
    data = DataSettings(train=str(tmp_path / "problems.jsonl"), problems_per_step=1)
    with GradingPool(workers=1) as graders:
        problems = load_problems(data, grade=graders.grade)
    assert problems.batch(1)[0].answer == json.loads(line)["answer"]


def test_the_readme_s_python_runs(tmp_path):
    """The fused loss and the plain one agree; a policy learns a response."""
    loss, policy = blocks(README, "python")
    script = tmp_path / "blocks.py"
    script.write_text(f"{loss}\nprint(fused.item(), plain.item(), student.grad.norm().item())\n{policy}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (fused, plain, norm), *updates = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert fused == pytest.approx(plain, rel=1e-5)
    assert norm > 0
    losses = [update[0] for update in updates]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3


QWEN3 = {  # hidden, feed-forward, layers, heads, tied: of the published models
    "Qwen3-1.7B": ("1p7b", 2048, 6144, 28, 16, True),
    "Qwen3-4B": ("4b", 2560, 9728, 36, 32, True),
    "Qwen3-8B": ("8b", 4096, 12288, 36, 32, False),
    "Qwen3-14B": ("14b", 5120, 17408, 40, 40, False),
    "Qwen3-32B": ("32b", 5120, 25600, 64, 64, False),
}
SIZES = re.findall(r"^\| (Qwen3-\S+) \| (\d+) \| (\d+) x (\d+) \| (.+) \|$", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_readme_s_sizes_are_the_planner_s(row, tmp_path):
    name, gpus, tensor, data, numbers = row
    folder, hidden, ffn, layers, heads, tied = QWEN3[name]
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "rope_theta": 1e6}
    config |= {"num_attention_heads": heads, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 40960, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = []
    for preset, change in (("paint", []), ("grpo", []), ("paint", ["model.lora=null"])):
        path = ROOT / "examples" / f"qwen3_{folder}" / f"{preset}.yaml"
        settings = load_settings(path, [f"model.hf_path={tmp_path}", *change])
        plan = make_plan(settings, processes=int(gpus), gpu_memory=80e9)
        assert (plan.tensor_parallel, plan.pipeline_parallel, plan.data_parallel) == (int(tensor), 1, int(data))
        found.append(f"{plan.memory.peak / 1e9:.1f}")
    assert found == numbers.split(" | ")


def test_every_size_is_in_the_readme():
    assert {row[0] for row in SIZES} == set(QWEN3)


def test_the_readme_lists_every_page():
    """A folder with an index needs only that."""
    text = README.read_text()
    listed = [page for page in PAGES[1:] if page.name == "index.md" or not page.with_name("index.md").exists()]
    listed += sorted((ROOT / "docs").rglob("*.ipynb"))
    assert not [page.name for page in listed if f"({page.relative_to(ROOT)})" not in text]


def test_an_index_lists_the_pages_of_its_folder():
    for index in (page for page in PAGES if page.name == "index.md"):
        text = index.read_text()
        others = [page for page in PAGES if page.parent == index.parent and page != index]
        assert not [page.name for page in others if f"({page.name})" not in text], index


def test_the_reference_has_every_public_name():
    found = {page: re.findall(r"^::: megatron_paint\.(\w+)$", page.read_text(), re.MULTILINE) for page in PAGES}
    names = sorted(name for names in found.values() for name in names)
    assert names == sorted(set(megatron_paint.__all__) - {"__version__"})
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    assert not [name for name in megatron_paint.__all__ if f"`{name}`" not in index]


WHY = ROOT / "docs" / "why_not_learning.md"


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.metric)
def test_the_warnings_of_a_run_are_those_of_the_code(sign):
    causes = "; ".join(f"({number}) {cause}" for number, cause in enumerate(sign.causes, start=1))
    row = f"| {sign.text} (`{sign.metric}` {sign.value:g}) | {sign.steps} | {causes} |"
    assert row in WHY.read_text().splitlines(), f"docs/why_not_learning.md does not have:\n{row}"


def test_metrics_and_settings_of_the_symptoms_exist():
    sections = describe.sections()
    known = {section.key for section in sections} | {
        setting.key for section in sections for setting in section.settings
    }
    text = FENCE.sub("", WHY.read_text())
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text)) - {"megatron_paint.grade"}
    metrics = set(re.findall(r"`([a-z_]+/[a-z_*]+)`", text))
    assert named <= known, named - known
    assert {name for name in metrics if not fnmatch.filter(METRICS, name)} == set()
    assert len(named) > 25
    assert len(metrics) > 20


def test_the_limit_of_the_clip_is_that_of_the_code():
    assert f"| `clip/share` above {CLIP_LIMIT} (a clip of entries) | {CLIP_STEPS} |" in WHY.read_text()


def test_drawings_are_those_of_their_scripts(tmp_path):
    folder = ROOT / "docs" / "drawings"
    shutil.copytree(folder, tmp_path / "drawings", ignore=shutil.ignore_patterns("*.svg", "__pycache__"))
    for drawing in sorted(folder.glob("*.svg")):
        script = tmp_path / "drawings" / drawing.with_suffix(".py").name
        subprocess.run([sys.executable, script], check=True, timeout=60)
        assert script.with_suffix(".svg").read_text() == drawing.read_text(), f"run docs/drawings/{script.name}"
