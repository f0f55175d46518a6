"""`medgpt data` and `--dry-run` on a terminal: counts, lengths, and one example with its loss mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from medicalgpt_cli.terminal.console import one_line, results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from medicalgpt_cli.engine.data.examples import Example
    from medicalgpt_cli.engine.data.messages import Conversation

_BAR = 40  # characters of the longest bar
_SHOWN = 4000  # characters of an example that are shown
_LEARNT = "bold green"


def show_data(
    report: Mapping[str, Any],
    conversations: Sequence[Conversation],
    examples: Sequence[Example],
    tokenizer: Any,
    number: int,
    console: Console | None = None,
) -> None:
    """Print a report of engine/data/report.inspect and, where `number` is not 0, that example (from 1)."""
    console = console or results()
    _show_counts(console, report)
    _show_histogram(console, report)
    if number == 0:
        return
    shown = examples or conversations
    if number > len(shown):
        if shown:
            console.print(f"\nthere is no example {number}: the last one is {len(shown)}", style="yellow")
        return
    one = shown[number - 1]
    how = "green" if _coloured(console) else "between ⟦ and ⟧"
    console.print(
        f"\nexample {number} of {len(shown)}, {one_line(one.at)}; what is learnt stands {how}",
        style="bold",
        soft_wrap=True,
    )
    text = (
        mask_text(examples[number - 1], tokenizer, _coloured(console))
        if examples
        else _turns_text(one, console)
    )
    console.print(text, soft_wrap=True)


def show_plan(
    plan: Mapping[str, Any],
    origins: Mapping[str, Mapping[str, Any]],
    report: Mapping[str, Mapping[str, Any]],
    examples: Sequence[Example],
    tokenizer: Any,
    console: Console | None = None,
) -> None:
    """What `--dry-run` shows: the plan, settings that are not defaults, the data, and an example."""
    console = console or results()
    # a name that has spaces may hold a path, which stays as it is
    rows = [(name if " " in name else name.replace("_", " "), _figure(value)) for name, value in plan.items()]
    _table(console, "plan", rows)
    given = [
        (name, f"{_figure(one['value'])}  ({one['origin']})")
        for name, one in origins.items()
        if one["origin"] != "default"
    ]
    _table(console, "settings that are not defaults", given)
    for name, part in report.items():
        if isinstance(part, Mapping) and part.get("histogram"):
            console.print()
            _show_counts(console, part, name.replace("_", " "))
            _show_histogram(console, part)
    if examples:
        how = "green" if _coloured(console) else "between ⟦ and ⟧"
        console.print(
            f"\nfirst example, {one_line(examples[0].at)}; what is learnt stands {how}",
            style="bold",
            soft_wrap=True,
        )
        console.print(mask_text(examples[0], tokenizer, _coloured(console)), soft_wrap=True)


def mask_text(example: Example, tokenizer: Any, coloured: bool) -> Text:
    """The tokens of an example as text: with a loss in colour, or between ⟦ and ⟧ where there is none."""
    from rich.text import Text

    text = Text()
    room = _SHOWN
    for learnt, group in groupby(range(len(example.labels)), lambda place: example.labels[place] >= 0):
        ids = [example.input_ids[place] for place in group]
        piece = _printable(tokenizer.decode(ids, skip_special_tokens=False))
        left_out = len(piece) - room
        piece = piece if left_out <= 0 else f"{piece[:room]} … {left_out:,} more characters"
        if learnt and not coloured:
            piece = f"⟦{piece}⟧"
        text.append(piece, style=_LEARNT if learnt else "dim")
        room -= len(piece)
        if room <= 0:
            break
    return text


def _turns_text(conversation: Conversation, console: Console) -> Text:
    from rich.text import Text

    text = Text()
    for message in conversation.messages:
        learnt = message["role"] == "assistant"
        content = _printable(message["content"])
        content = content if len(content) <= _SHOWN else f"{content[:_SHOWN]} …"
        text.append(f"{message['role']}: ", style="cyan")
        text.append(
            f"⟦{content}⟧" if learnt and not _coloured(console) else content, style=_LEARNT if learnt else ""
        )
        text.append("\n")
    return text


def _show_counts(console: Console, report: Mapping[str, Any], title: str = "data") -> None:
    """Records, formats and every reason why one is not used as it stands, with places to look at."""
    rows = [("records", f"{report['used']:,} used of {report['read']:,} read")] if report["read"] else []
    rows += [(kind, one_line(file)) for file, kind in report["formats"].items()]
    if report.get("examples"):
        share = report["target_tokens"] / max(report["tokens"], 1)
        rows.append(("examples", f"{report['examples']:,}"))
        rows.append(
            ("tokens", f"{report['tokens']:,}, of which {report['target_tokens']:,} ({share:.0%}) are learnt")
        )
    else:
        counted = [(name, report.get(name)) for name in ("documents", "blocks", "pairs", "prompts", "tokens")]
        rows += [(name, f"{number:,}") for name, number in counted if number]
    for kind in ("skipped", "merged", "truncated"):
        for reason, number in report.get(kind, {}).items():
            places = ", ".join(one_line(place) for place in report["places"].get(reason, [])[:3])
            rows.append((kind, f"{number:,}: {reason} ({places})"))
    if report.get("tokens_cut"):
        rows.append(("cut", f"{report['tokens_cut']:,} tokens at --max-length {report['max_length']}"))
    rows += [("note", one_line(notice)) for notice in report["notices"]]
    _table(console, title, rows)


def _show_histogram(console: Console, report: Mapping[str, Any]) -> None:
    lengths, bars = report["lengths"], report["histogram"]
    if not bars:
        return
    unit = report.get("unit", "tokens")
    facts = ", ".join(f"{name} {value:,}" for name, value in lengths.items())
    console.print(f"\nlength in {unit}: {facts}", style="bold", soft_wrap=True)
    largest = max(bar["count"] for bar in bars)
    width = len(f"{bars[-1]['to']:,}")
    for bar in bars:
        block = "█" * round(bar["count"] / largest * _BAR) or ("▏" if bar["count"] else "")
        over = report["max_length"] is not None and bar["to"] > report["max_length"]
        label = f"{bar['from']:>{width},} – {bar['to']:>{width},}"
        console.print(f"{label}  {block} {bar['count']:,}", style="yellow" if over else "", soft_wrap=True)
    if report.get("longer"):
        console.print(f"{report['longer']:,} longer than --max-length {report['max_length']}", style="yellow")


def _table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    from rich.text import Text

    if not rows:
        return
    console.print(Text(title, style="bold"))
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        console.print(Text.assemble((f"{label:<{width}}", "cyan"), value), soft_wrap=True)


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else one_line(str(value))


def _coloured(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _printable(text: str) -> str:
    """Text that cannot drive the terminal: control characters other than line ends are shown as ·."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "·" for letter in text)
