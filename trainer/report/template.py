"""HTML pages from the templates beside this file: all text is escaped, a page needs nothing beside it."""

import base64
import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters["kind"] = lambda data: {b"<": "image/svg+xml", b"\xff": "image/jpeg"}.get(data[:1], "image/png")
_PAGES.filters["base64"] = lambda data: base64.b64encode(data).decode()


def render(template: str, **content: Any) -> str:
    """A page; all of its templates extend ``base.html``, which wants a ``title``."""
    return _PAGES.get_template(template).render(**content)


def plain(template: str, **content: Any) -> str:
    """A text that is no page, such as Markdown: nothing is escaped."""
    return _PAGES.overlay(autoescape=False).get_template(template).render(**content)


def as_words(cell: object) -> str:
    """A cell without marks: what a page has in small print stands in brackets."""
    text = re.sub(r"\s*(?:<br>)?<small>(.*?)</small>", r" (\1)", str(cell)).replace("<br>", ", ")
    return html.unescape(text)


def small(text: str, aside: str) -> Markup:
    """A cell: text, and in small print what stands beside it."""
    return Markup("{} <small>{}</small>").format(text, aside)


def stacked(text: str, *below: str) -> Markup:
    """A cell: text, and in small print the lines below it."""
    return Markup("{}<br><small>{}</small>").format(text, Markup("<br>").join(below))
