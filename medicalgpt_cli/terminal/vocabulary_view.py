"""`medgpt vocabulary` on a terminal: what is new, what it saves, and what stayed as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medicalgpt_cli.terminal.console import messages, one_line

if TYPE_CHECKING:
    from rich.console import Console

_LANGUAGES = {"zh": "Chinese", "en": "English", "other": "other"}
_TERMS = 12  # terms that are named


def show_vocabulary(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report of engine/model/vocabulary.extend."""
    console = console or messages()
    _facts(console, "vocabulary", _vocabulary(report))
    _languages(console, report)
    for name, title in (("corpus", "on the corpus"), ("check", "on the check data")):
        if report[name]:
            _facts(console, title, _stayed(report[name]))
    _top(console, report["top"])


def _vocabulary(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    sizes, terms = report["vocabulary"], report["terms"]
    new = sizes["new"] + sizes["intermediate"]
    rows = [
        ("base", f"{one_line(report['base'])}, {sizes['base']:,} tokens in {sizes['base_rows']:,} rows"),
        (
            "new tokens",
            f"{new:,}: {sizes['new']:,} words, {sizes['intermediate']:,} steps on the way to them",
        ),
        ("rows", f"{sizes['rows']:,}, of which {sizes['padding_rows']:,} belong to no token"),
        *(("left out", f"{number:,}: {reason}") for reason, number in report["left_out"].items()),
        (
            "medical terms",
            f"{terms['one_token_now']:,} of {terms['looked_for']:,} are one token, "
            f"before {terms['one_token_before']:,}",
        ),
    ]
    if gained := terms["gained"]:
        named = ", ".join(f"{one_line(one['term'])} ({one['was']})" for one in gained[:_TERMS])
        more = f" and {len(gained) - _TERMS:,} more" if len(gained) > _TERMS else ""
        rows.append(("", f"gained: {named}{more}"))
    return rows


def _stayed(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    unchanged = found["documents"] - found["documents_changed"]
    return [
        ("documents", f"{found['documents']:,}, of which {unchanged:,} have no new token"),
        ("old text", f"{found['changed_without_new_token']:,} of these have other tokens than before"),
        (
            "replaced",
            f"{found['old_tokens_replaced']:,} tokens by {found['new_tokens_used']:,} new ones",
        ),
        ("given back", f"{found['given_back_exactly']:,} of {found['documents']:,} documents exactly"),
    ]


def _languages(console: Console, report: Mapping[str, Any]) -> None:
    rows = []
    for name in ("corpus", "check"):
        for language, one in (report[name] or {}).get("languages", {}).items():
            rows.append(
                (
                    "corpus" if name == "corpus" else "check data",
                    _LANGUAGES.get(language, language),
                    f"{one['characters']:,}",
                    *(f"{one[f'tokens_per_character_{when}']:.3f}" for when in ("before", "after")),
                    *(f"{one[f'characters_per_token_{when}']:.2f}" for when in ("before", "after")),
                )
            )
    heads = ("text", "language", "characters", "tokens/char.", "now", "char./token", "now")
    _table(console, "tokens and characters", heads, rows)


def _top(console: Console, words: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (one_line(one["token"]), f"{one['count']:,}", f"{one['was']:,}", f"{one['saved']:,}") for one in words
    ]
    _table(console, "most frequent new words", ("word", "uses", "tokens before", "tokens saved"), rows)


def _facts(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    from rich.text import Text

    console.print(Text(title, style="bold"))
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        console.print(Text.assemble((f"{label:<{width}}", "cyan"), value), soft_wrap=True)


def _table(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for number, head in enumerate(heads):
        textual = number == 0 or head == "language"
        table.add_column(head, justify="left" if textual else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
