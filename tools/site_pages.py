"""A hook of MkDocs: the pages of the site that are no Markdown files in docs/.

* README.md is the home page.
* A notebook becomes a page with its stored outputs.
* A page may link to a file of the repository outside docs/. The site has a page with this file, in source/. So the link
  works in the site, without an address of the repository, and on a code host, which follows the path.
"""

import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
HOME = "README.md"
SOURCE = "source/"
CODE_OR_LINK = re.compile(
    r"(?P<code>^(?P<fence>```+).*?^(?P=fence)$|`[^`\n]+`)|\]\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL
)
ADDRESS = re.compile(r"[a-z]+:|#")
SHOWN_FILE = re.compile(r"^(```+\w+) file=(\S+)")  # how a page names the file that a code block is
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".sbatch": "bash", ".json": "json", ".sh": "bash"}
log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages. A link to a file that does not exist is a warning, which ends a strict build."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.append(
                File.generated(config, site_path(f"{DOCS}{file.src_uri}"), content=_text_of(DOCS + file.src_uri))
            )
    files.append(File.generated(config, site_path(HOME), content=_text_of(HOME)))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        origin = repository_path(page.src_uri)
        for target in links(page.content_string):
            path = linked_path(origin, target)
            if path is None or path.startswith(DOCS) or files.get_file_from_path(site_path(path)):
                continue
            if not (ROOT / path).is_file():
                log.warning("%s links to %s, which is no file of the repository", origin, target)
                continue
            new = File.generated(config, site_path(path), content=_text_of(path))
            files.append(new)
            waiting.append(new)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lets links lead to the pages of the site, and gives a code block the name of its file as a title."""
    here = page.file.src_uri
    origin = repository_path(here)

    def changed(match: re.Match[str]) -> str:
        if match["code"]:
            return SHOWN_FILE.sub(r'\1 title="\2"', match["code"])
        path = linked_path(origin, match["target"])
        if path is None:
            return match[0]
        _, mark, anchor = match["target"].partition("#")
        return f"]({posixpath.relpath(site_path(path), posixpath.dirname(here))}{mark}{anchor})"

    return CODE_OR_LINK.sub(changed, markdown)


def links(markdown: str) -> Iterator[str]:
    """The targets of a page's links, without those in code."""
    return (match["target"] for match in CODE_OR_LINK.finditer(markdown) if match["target"])


def linked_path(origin: str, target: str) -> str | None:
    """The file that a link in `origin` leads to, both as paths in the repository. None: an address or an anchor."""
    if ADDRESS.match(target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target.partition("#")[0]))


def site_path(path: str) -> str:
    """Where the site has a file of the repository: `docs/data.md` is `data.md`, `x.py` is `source/x.py.md`."""
    if path == HOME:
        return "index.md"
    if path.startswith(DOCS):
        path = path.removeprefix(DOCS)
        return path.removesuffix(".ipynb") + ".md" if path.endswith(".ipynb") else path
    return SOURCE + (path if path.endswith(".md") else f"{path}.md")


def repository_path(page: str) -> str:
    """The file of the repository that a page of the site shows; the inverse of `site_path`."""
    if page == "index.md":
        return HOME
    if page.startswith(SOURCE):
        path = page.removeprefix(SOURCE)
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    notebook = f"{DOCS}{page.removesuffix('.md')}.ipynb"
    return notebook if (ROOT / notebook).is_file() else DOCS + page


def _text_of(path: str) -> str:
    """The Markdown of the page of a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return notebook_text(json.loads(text), path)
    return (
        f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{_block(text, LANGUAGES.get(Path(path).suffix, 'text'))}"
    )


def notebook_text(notebook: dict[str, Any], path: str) -> str:
    """A notebook as Markdown: its text, its code and its outputs. It gets a line that says where the notebook is."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _block(source, "python"))
        parts += [_output_text(output) for output in cell.get("outputs", ())]
    head, _, rest = "\n\n".join(parts).partition("\n\n")
    note = f"This page is the notebook `{path}`. `make docs` executes it."
    return f"{head}\n\n{note}\n\n{rest}\n"


def _output_text(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f'<img alt="output of the cell" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return _block("".join(data["text/plain"]), "text")


def _block(text: str, language: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
