"""The documentation site: a strict build has every page, loads nothing from other hosts, and finds broken links."""

import importlib
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import megatron_paint
from tests.report.browser import chromium, missing

pytest.importorskip("mkdocs", reason="the site needs the extra docs: pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="the site needs the extra docs: pip install -e '.[docs]'")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
site_pages = importlib.import_module("site_pages")

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a warning ends the build. torch cannot be imported in it."""
    folder = tmp_path_factory.mktemp("site")
    code = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"
    done = subprocess.run(
        [sys.executable, "-c", code, "build", "--strict", "--site-dir", str(folder / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "site"


class Loaded(HTMLParser):
    """What a page loads, and its links."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded, self.links, self.ids = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in LOADS and values.get(LOADS[tag]):
            self.loaded.append(values[LOADS[tag]])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if values.get("id"):
            self.ids.add(values["id"])


def test_pages_load_nothing_from_other_hosts(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        assert not [found for found in Loaded(page).loaded if re.match(r"(?:[a-z]+:)?//", found)], page
    styles = [text for file in site.rglob("*.css") for text in re.findall(r"url\(([^)]*)\)", file.read_text())]
    assert not [text for text in styles if re.match(r"['\"]?(?:https?:)?//", text)]


def test_links_within_the_site_lead_somewhere(site):
    """Also those that MkDocs does not check: in the pages of files outside docs/."""
    pages = {page: Loaded(page) for page in site.rglob("*.html") if page.name != "404.html"}
    for page, content in pages.items():
        for link in content.links:
            name, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or (not name and not anchor):
                continue
            target = (page.parent / name).resolve() if name else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page.relative_to(site)} links to {link}"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{page.relative_to(site)} links to {link}"


def test_every_public_name_has_its_section(site):
    ids = set().union(*(Loaded(page).ids for page in (site / "api").glob("*.html")))
    assert not [
        name for name in megatron_paint.__all__ if name != "__version__" and f"megatron_paint.{name}" not in ids
    ]


def test_the_home_page_is_the_readme(site):
    text = (site / "index.html").read_text()
    assert "PAINT on Megatron-Core." in text
    assert 'href="guides/laptop.html"' in text


def test_a_notebook_is_a_page_with_its_outputs(site):
    text = (site / "notebooks" / "report_data.html").read_text()
    assert "reveal follows from the overlap in all steps" in text
    assert text.count('src="data:image/png;base64,') == 1
    assert (site / "notebooks" / "report_data.ipynb").is_file()


def test_the_file_of_a_code_block_is_its_title(site):
    assert '<span class="filename">mine.jsonl</span>' in (site / "guides" / "laptop.html").read_text()


@pytest.fixture(scope="module")
def address(site):
    """Where a server on this machine shows the site."""
    handler = partial(SilentHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def search(browser, text):
    """Types a text into the search of the page that is open, and waits for results."""
    browser.wait("return document.readyState === 'complete' && document.querySelector('.md-search__input')")
    browser.run(f"const field = document.querySelector('.md-search__input'); field.focus(); field.value = '{text}';")
    browser.run("document.querySelector('.md-search__input').dispatchEvent(new Event('keyup'))")
    browser.wait("return document.querySelectorAll('.md-search-result__item').length > 3")


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")
def test_pages_in_a_browser_ask_this_site_alone(address):
    """Also when the search is used. The console has no error."""
    with chromium() as browser:
        browser.driver.get("about:blank")
        browser.requests()  # of the browser's own first page
        for page in ("index.html", "guides/laptop.html", "api/losses.html", "notebooks/report_data.html"):
            browser.driver.get(address + page)
            browser.wait("return document.readyState === 'complete' && document.querySelector('.md-search__input')")
        search(browser, "reveal")
        asked = browser.requests()
        assert len(asked) > 10
        assert not [url for url in asked if not url.startswith((address, f"blob:{address}"))]
        assert browser.messages() == []


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")
@pytest.mark.parametrize("name", ["index.html", "guides/laptop.html"])
def test_the_search_works_in_pages_that_are_opened_from_files(site, name):
    with chromium() as browser:
        browser.driver.get((site / name).as_uri())
        search(browser, "reveal")
        links = browser.run(
            "return [...document.querySelectorAll('.md-search-result__link')].map((link) => link.href.split(/[?#]/)[0])"
        )
        assert f"{site.as_uri()}/algorithm.html" in links
        assert not [link for link in links if not Path(link.removeprefix("file://")).is_file()]
        assert not [url for url in browser.requests() if url.startswith("http")]
        assert browser.messages() == []


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")
def test_the_colours_follow_the_system(address):
    """Also after the first visit, which stores the reader's palette."""
    with chromium() as browser:
        for scheme, palette in (("light", "default"), ("dark", "slate"), ("light", "default")):
            browser.prefer(scheme)
            browser.driver.get(address + "guides/laptop.html")
            browser.wait(f"return document.body?.dataset.mdColorScheme === '{palette}'")


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")
@pytest.mark.parametrize(
    ("scheme", "palette"), [("light", "default"), pytest.param("dark", "slate", marks=pytest.mark.long)]
)
def test_axe_finds_nothing_serious(address, scheme, palette):
    with chromium() as browser:
        browser.prefer(scheme)
        for page in ("index.html", "guides/laptop.html", "api/losses.html", "notebooks/loss.html", "settings.html"):
            browser.driver.get(address + page)
            browser.wait("return document.querySelector('.md-search')?.ariaLabel === 'Search'")
            assert browser.run("return document.body.dataset.mdColorScheme") == palette
            assert browser.axe() == [], page


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("README.md", "index.md"),
        ("docs/data.md", "data.md"),
        ("docs/guides/laptop.md", "guides/laptop.md"),
        ("docs/notebooks/loss.ipynb", "notebooks/loss.md"),
        ("examples/slurm/README.md", "source/examples/slurm/README.md"),
        ("megatron_paint/policy.py", "source/megatron_paint/policy.py.md"),
    ],
)
def test_where_a_file_is(path, page):
    assert site_pages.site_path(path) == page
    assert site_pages.repository_path(page) == path


def test_links_in_code_are_left_alone():
    text = "`[a](b.md)` [c](d.md)\n```text\n[e](f.md)\n```\n[g](https://example.org) [h](#i)"
    assert list(site_pages.links(text)) == ["d.md", "https://example.org", "#i"]
    assert site_pages.linked_path("docs/guides/a.md", "../../README.md#x") == "README.md"
    assert site_pages.linked_path("docs/guides/a.md", "#x") is None
    assert site_pages.linked_path("docs/guides/a.md", "https://example.org") is None


def test_a_file_with_fences_is_one_block():
    assert site_pages._block("a\n```\nb\n", "text") == "````text\na\n```\nb\n````"


def test_a_link_to_no_file_ends_a_strict_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "site_pages.py", tmp_path / "tools")
    (tmp_path / "mkdocs.yml").write_text("site_name: a\nhooks: [tools/site_pages.py]\n")
    (tmp_path / "tool.py").write_text("print(1)\n")
    (tmp_path / "docs" / "a.md").write_text("# A\n[home](../README.md)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    (tmp_path / "README.md").write_text("# Home\n[wrong](tols.py) [folder](docs)")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.findall(r"WARNING -  (.* no file of the repository)", done.stderr) == WRONG
    (tmp_path / "README.md").write_text("# Home\n[right](tool.py) [page](docs/a.md)")
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "site" / "source" / "tool.py" / "index.html").is_file()


WRONG = [
    "README.md links to tols.py, which is no file of the repository",
    "README.md links to docs, which is no file of the repository",
]
