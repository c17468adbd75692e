"""The file of a report: its data, its pages of samples, and that nothing of a run becomes markup."""

import json
import re
from pathlib import Path

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.cli.main import main
from megatron_paint.report.build import write_report
from megatron_paint.report.page import ASSETS, SCRIPTS, STYLES, TEMPLATE, asset, json_block
from megatron_paint.report.pages import encode
from tests.report.made_run import decode, make_run, read_block

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 ' \" & \x00 <img src=x onerror=alert(2)>"


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_the_file_holds_everything(run, tmp_path):
    written = write_report([run], tmp_path / "report.html")
    page = written.file.read_text()
    data, pages = read_block(page, "report-data"), read_block(page, "report-pages")
    assert (written.folder, written.samples, written.notices) == (None, 12, ())
    assert [one["name"] for one in data["runs"]] == ["run"]
    assert data["pages"] is None
    assert list(pages) == ["r0_e0_0", "r0_e3_0", "r0_1_0", "r0_2_0", "r0_3_0"]
    assert [entry["text"][:7] for entry in decode(pages["r0_2_0"])["entries"]] == [
        "40+8=50",
        "41+8=51",
        "42+8=52",
        "43+8=53",
    ]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "report.html", run]


def test_samples_that_do_not_fit_are_beside_the_file(run, tmp_path):
    """The first page that does not fit moves those before it too."""
    whole = write_report([run], tmp_path / "whole.html")
    sizes = [len(text) for text in read_block(whole.file.read_text(), "report-pages").values()]
    written = write_report([run], tmp_path / "report.html", budget=sum(sizes[:2]))
    page = written.file.read_text()
    assert read_block(page, "report-data")["pages"] == "report_files"
    assert read_block(page, "report-pages") == {}
    files = sorted(written.folder.iterdir())
    assert [file.name for file in files] == ["r0_1_0.js", "r0_2_0.js", "r0_3_0.js", "r0_e0_0.js", "r0_e3_0.js"]
    found = re.fullmatch(r'paint\.receivePage\("r0_3_0","([A-Za-z0-9+/=]+)"\);\n', files[2].read_text())
    assert decode(found[1]) == decode(read_block(whole.file.read_text(), "report-pages")["r0_3_0"])
    assert written.bytes == written.file.stat().st_size + sum(file.stat().st_size for file in files)
    # A smaller report removes the files, which belong to no report then.
    assert write_report([run], tmp_path / "report.html").folder is None
    assert not (tmp_path / "report_files").exists()


def test_other_files_are_not_removed(run, tmp_path):
    other = tmp_path / "report_files" / "thesis.txt"
    other.parent.mkdir()
    other.write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.txt; give another --out"):
        write_report([run], tmp_path / "report.html")
    assert other.exists()


def test_several_runs_have_their_own_pages(tmp_path):
    runs = [make_run(tmp_path / name, steps=1) for name in ("one", "two")]
    page = write_report(runs, tmp_path / "report.html").file.read_text()
    data = read_block(page, "report-data")
    assert list(read_block(page, "report-pages")) == ["r0_e0_0", "r0_e3_0", "r0_1_0", "r1_e0_0", "r1_e3_0", "r1_1_0"]
    assert data["samples"]["run"] == [0] * 4 + [1] * 4
    assert data["samples"]["page"] == ["1_0"] * 8


def test_nothing_of_a_run_is_markup(tmp_path):
    """The page has exactly the tags of its template, however hostile names, logs and samples are."""
    plain = make_run(tmp_path / "plain", steps=1)
    hostile = make_run(tmp_path / "<img src=x onerror=alert(3)>", steps=1, log=f"12:00:00  warning: {HOSTILE}\n")
    file = hostile / "samples" / "step_000001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["id"] = line["response_text"] = line["reveal"]["reference_text"] = HOSTILE
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pages = [
        write_report([one], tmp_path / f"{index}.html").file.read_text() for index, one in enumerate((plain, hostile))
    ]
    tags = [
        re.findall(
            r"<[^>]*>",
            re.sub(r'nonce="[^"]*"|nonce-[^&]*', "", page.split("<title>")[0] + page[page.index("</title>") :]),
        )
        for page in pages
    ]
    assert tags[0] == tags[1]
    assert "<title>&lt;img src=x" in pages[1]
    assert read_block(pages[1], "report-data")["samples"]["id"] == [HOSTILE] * 4


def test_json_block_has_no_tag_and_keeps_every_character():
    value = {"<!--": [HOSTILE, "\U0001f600", "\ud800", 1.5, None, True]}
    text = str(json_block(value))
    assert "<" not in text
    assert json.loads(text) == {"<!--": [HOSTILE, "\U0001f600", "\ud800", 1.5, None, True]}


def test_encoded_pages_are_letters_alone():
    text = encode({"a": HOSTILE + "\ud800"})
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert decode(text) == {"a": HOSTILE + "\ud800"}


def test_the_policy_allows_only_the_page_itself(run, tmp_path):
    pages = [write_report([run], tmp_path / "report.html").file.read_text() for _ in range(2)]
    found = [re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1] for page in pages]
    nonces = [re.search(r"script-src &#39;nonce-([\w-]+)&#39;", policy)[1] for policy in found]
    assert nonces[0] != nonces[1]
    assert "default-src &#39;none&#39;" in found[0]
    assert "connect-src &#39;none&#39;" in found[0]
    assert "unsafe" not in found[0]
    assert pages[0].count(f'nonce="{nonces[0]}"') == len(STYLES) + len(SCRIPTS)


def test_assets_end_no_block_and_load_nothing():
    for name in (*STYLES, *SCRIPTS, TEMPLATE):
        text = asset(name)
        assert name == TEMPLATE or not re.search(r"</(script|style)", text, re.IGNORECASE), name
        own = text.replace("http://www.w3.org/2000/svg", "")
        assert name.startswith("uplot/") or not re.search(r"https?:|@import|url\(", own), name
        if name.endswith(".js") and not name.startswith("uplot/"):
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text
            ), name


def test_every_asset_is_used_or_a_licence():
    there = {path.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("*") if path.is_file()}
    assert there == {*STYLES, *SCRIPTS, TEMPLATE, "uplot/LICENSE"}


def test_a_wheel_has_every_asset():
    from distutils.core import run_setup

    from setuptools import Distribution  # noqa: F401  (it provides distutils from Python 3.12 on)

    globs = run_setup(str(ROOT / "setup.py"), stop_after="init").package_data["megatron_paint.report"]
    packed = {path for pattern in globs for path in ASSETS.parent.glob(pattern) if path.is_file()}
    assert packed == {path for path in ASSETS.rglob("*") if path.is_file()}


def test_the_command(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert re.fullmatch(rf"{run}/report\.html: \d\.\d MB, 12 samples, \d+\.\d s\n", capsys.readouterr().out)
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
    assert main(["report", str(run), "--port", "80"]) == 2
    assert "--port belongs to --serve" in capsys.readouterr().err
    assert main(["report", str(run), "--serve", "--out", "report.html"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    (run / "logs" / "console.log").unlink()
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert capsys.readouterr().out.startswith("notice: warnings are not known: there is no console.log\n")
