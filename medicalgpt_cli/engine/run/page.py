"""Pieces of the HTML pages that medgpt writes. Every text that comes from outside is escaped here."""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template
from typing import Any


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page: no script, nothing from a network."""
    template = Template(resources.files(__package__).joinpath("report_page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(filter(None, sections)))


def table(rows: Iterable[Sequence[Any]], head: Sequence[Any] = (), row_class: str = "") -> str:
    """A table; a cell is text or (text, class)."""

    def cell(tag: str, content: Any) -> str:
        text, kind = content if isinstance(content, tuple) else (content, "")
        return f'<{tag} class="{kind}">{escape(text)}</{tag}>' if kind else f"<{tag}>{escape(text)}</{tag}>"

    top = f"<tr>{''.join(cell('th', one) for one in head)}</tr>" if head else ""
    body = "".join(f'<tr class="{row_class}">{"".join(cell("td", one) for one in row)}</tr>' for row in rows)
    return f'<div class="table"><table>{top}{body}</table></div>'


def escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def answer_text(answer: str | None) -> str:
    return escape(answer) if answer else '<span class="soft">(nothing)</span>'


def duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minute else f"{second} s"


def utc(stamp: str | None) -> str:
    if not stamp:
        return ""
    return f"{datetime.datetime.fromisoformat(stamp.replace('Z', '+00:00')):%Y-%m-%d %H:%M} UTC"
