"""The HTML page: template, styles and scripts of assets/ around the data."""

import functools
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_paint.base.json_text import to_json

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = "page.html.jinja"
STYLES = ("uplot/uPlot.min.css", "style.css", "samples.css")
# Plain scripts, each in its own block, in the order in which they need each other.
SCRIPTS = (
    "uplot/uPlot.iife.min.js",
    "base.js",
    "data.js",
    "plots.js",
    "overview.js",
    "tables.js",
    "filters.js",
    "list.js",
    "viewer.js",
    "tokens.js",
    "sample.js",
    "answers.js",
    "keys.js",
    "main.js",
)


def render(data: Mapping[str, Any], *, title: str, pages: Mapping[str, str], live: bool = False) -> str:
    """The page. data: what the scripts show. pages: encoded pages that the file itself holds, by key.

    Nothing of a run is markup: data and pages are JSON in script blocks of a type that no browser runs.
    """
    nonce = secrets.token_urlsafe(16)
    return _template().render(
        title=title,
        nonce=nonce,
        policy=content_policy(nonce, live=live),
        styles=[Markup(asset(name)) for name in STYLES],
        scripts=[Markup(_with_licence(name)) for name in SCRIPTS],
        data=json_block(data),
        pages=json_block(pages),
    )


def content_policy(nonce: str, *, live: bool) -> str:
    """The content security policy. Only the page's own scripts run, and only a live page may talk to its server."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'nonce-{nonce}'",
            f"style-src 'nonce-{nonce}'",
            "img-src data:",
            "connect-src 'self'" if live else "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types pages",
        )
    )


def json_block(value: Any) -> Markup:
    """JSON that no HTML parser takes for markup: every < is an escape."""
    return Markup(to_json(value).replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode("utf-8"))


def _with_licence(name: str) -> str:
    """A script; one of others with its licence, which each copy must have."""
    folder = name.rpartition("/")[0]
    return f"/*\n{asset(f'{folder}/LICENSE')}*/\n{asset(name)}" if folder else asset(name)


@functools.cache
def asset(name: str) -> str:
    """The text of a file in assets/."""
    return (ASSETS / name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(asset(TEMPLATE))
