"""`medgpt data` and `--dry-run` on a terminal: counts, lengths, and one example with its loss mask."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from medicalgpt_cli.terminal.console import one_line, results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from medicalgpt_cli.engine.data.examples import Example
    from medicalgpt_cli.engine.data.inspection import Inspection, Item

_BAR = 40  # characters of the longest bar
_SHOWN = 4000  # characters of an example that are shown
_LEARNT = "bold green"
_SCRIPTS = {"zh": "Chinese", "en": "English or another in Latin script", "other": "other"}


def show_data(found: Inspection, tokenizer: Any, number: int, console: Console | None = None) -> None:
    """Print what engine/data/inspection.inspect found and, where `number` is not 0, that record (from 1)."""
    console = console or results()
    report = found.report
    _show_counts(console, report, more=[*_about_records(report), *_written(report)])
    _show_histogram(console, report)
    _show_wrong(console, report)
    if number == 0 or not found.items:
        return
    if number > len(found.items):
        console.print(f"\nthere is no example {number}: the last one is {len(found.items)}", style="yellow")
        return
    item = found.items[number - 1]
    how = "green" if _coloured(console) else "between ⟦ and ⟧"
    console.print(
        f"\nexample {number} of {len(found.items):,}, {one_line(item.record.at)}; what is learnt stands {how}",
        style="bold",
        soft_wrap=True,
    )
    for text in record_texts(item, tokenizer, _coloured(console)):
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


def record_texts(item: Item, tokenizer: Any, coloured: bool) -> Iterator[Text]:
    """A record as texts for the screen: what stands beside its turns, and its turns with what is learnt of them.

    With a tokenizer the turns are the tokens that a model trains on, else they stand as they are written.
    """
    from rich.text import Text

    record = item.record
    facts = [*_facts(item)]
    width = max((len(label) for label, _ in facts), default=0) + 2
    for label, value in facts:
        yield Text.assemble((f"{label:<{width}}", "cyan"), _short(value))
    if record.text is not None:
        yield Text(_short(record.text))
    elif not item.examples:
        yield from _turns(item, coloured)
    elif not item.pairs:
        for example in item.examples:
            yield mask_text(example, tokenizer, coloured)
    else:
        for name, example in zip(itertools.cycle(("chosen", "rejected")), item.examples):
            yield Text(f"{name}:", style="cyan")
            yield mask_text(example, tokenizer, coloured)


def _facts(item: Item) -> Iterator[tuple[str, str]]:
    """What a record has beside its turns."""
    record = item.record
    for tool in record.tools:
        parameters = tool["parameters"].get("properties")
        names = ", ".join(parameters) if isinstance(parameters, dict) else ""
        yield "tool", f"{tool['name']}({names})  {tool['description']}"
    if record.options is not None:
        yield "options", ", ".join(record.options)
        yield "right option", ", ".join(record.key) or "none is named"
    if record.label is not None:
        yield "label", "good" if record.label else "bad: nothing is learnt of it in sft"
    if item.pairs and "margin" in item.value:
        yield "margin", str(item.value["margin"])
    if len(record.variants):
        yield "phrasings", f"{len(record.variants) + 1} of one question, a conversation each"
    if record.group is not None:
        yield "group", record.group


def _turns(item: Item, coloured: bool) -> Iterator[Text]:
    """The turns of a record as they are written, with what stands in them beside their text."""
    from rich.text import Text

    record = item.record
    for message in record.messages:
        answer = message["role"] == "assistant"
        weight = message.get("weight", 1)
        learnt = answer and bool(weight) and bool(item.conversations) and not record.answers
        name = message["role"] if weight == 1 else f"{message['role']}, weight {weight:g}"
        if answer and weight == 0:
            name += ", context only"
        if "reasoning" in message:
            yield _turn(f"{name}, reasoning", message["reasoning"], learnt, coloured)
        if message["content"] or not message.get("tool_calls"):
            yield _turn(name, message["content"], learnt, coloured)
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            yield _turn(f"{name}, call", f"{call['name']} {arguments}", learnt, coloured)
    for number, text in enumerate(record.answers):
        better = item.pairs and record.ranks[number] == record.ranks[0]
        if len(record.answers) == 2:
            name = "chosen" if number == 0 else "rejected"
        else:
            name = f"answer of rank {sorted(set(record.ranks)).index(record.ranks[number]) + 1}"
        yield _turn(name, text, bool(better) or (number == 0 and bool(item.conversations)), coloured)
    if not record.messages and not record.answers:
        yield Text("(no turns)")


def _turn(name: str, content: str, learnt: bool, coloured: bool) -> Text:
    from rich.text import Text

    content = _short(content)
    shown = f"⟦{content}⟧" if learnt and not coloured else content
    return Text.assemble((f"{name}: ", "cyan"), (shown, _LEARNT if learnt else ""))


def _short(text: str) -> str:
    text = _printable(text)
    left_out = len(text) - _SHOWN
    return text if left_out <= 0 else f"{text[:_SHOWN]} … {left_out:,} more characters"


def _about_records(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys, languages, what records hold, and what repeats."""
    rows = []
    for where in dict.fromkeys(one["where"] for one in report["keys"]):
        keys = [one for one in report["keys"] if one["where"] == where]
        named = [
            f"{one['key']} {one['records']:,}" + (f" ({one['empty']:,} empty)" if one["empty"] else "")
            for one in keys
        ]
        rows.append((f"keys of {'an' if where[0] in 'aeiou' else 'a'} {where}", one_line(", ".join(named))))
    if len(report["uses"]) > 1:
        rows.append(("read for", ", ".join(f"{name} {number:,}" for name, number in report["uses"].items())))
    if report["holds"]:
        rows.append(("with", ", ".join(f"{name} {number:,}" for name, number in report["holds"].items())))
    total = sum(report["languages"].values())
    if total:
        shares = (f"{_SCRIPTS[name]} {number / total:.0%}" for name, number in report["languages"].items())
        rows.append(("languages", ", ".join(shares)))
    if report["groups"]:
        rows.append(("groups", f"{report['groups']['groups']:,} of {report['groups']['records']:,} records"))
    repeated = report["duplicates"]
    for kind in ("exact", "near"):
        if repeated[kind]:
            places = ", ".join(
                f"{one_line(one)} = {one_line(of)}" for one, of in repeated[f"{kind}_places"][:3]
            )
            word = "repeat another one" if kind == "exact" else "nearly repeat another one"
            rows.append(("duplicates", f"{repeated[kind]:,} records {word} ({places})"))
    if not repeated["exact"] and not repeated["near"]:
        rows.append(("duplicates", "none"))
    if repeated["note"]:
        rows.append(("", f"only exact ones were looked for: {repeated['note']}"))
    return rows


def _written(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    written = report.get("written")
    if not written:
        return []
    rows = [
        ("written", f"{number:,} records to {one_line(file)}") for file, number in written["files"].items()
    ]
    left_out = written["left_out"]
    if any(left_out.values()):
        rows.append(("left out", f"{left_out['exact']:,} exact and {left_out['near']:,} near duplicates"))
    return rows


def _show_wrong(console: Console, report: Mapping[str, Any]) -> None:
    """The first wrong records, and how many there are."""
    from rich.text import Text

    if not report["wrong"]:
        return
    console.print(Text(f"\nwrong records: {report['wrong_total']:,}", style="bold red"))
    for one in report["wrong"]:
        console.print(Text(one_line(one["message"])), soft_wrap=True)
    more = report["wrong_total"] - len(report["wrong"])
    if more:
        console.print(f"… and {more:,} more", style="dim")


def _show_counts(
    console: Console,
    report: Mapping[str, Any],
    title: str = "data",
    more: Sequence[tuple[str, str]] = (),
) -> None:
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
    rows += more
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
    for bar in itertools.dropwhile(lambda bar: not bar["count"], bars):
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
    if console.is_terminal:  # a long value goes on below itself, not below its label
        from rich.table import Table

        grid = Table.grid()
        grid.add_column(width=width, style="cyan", no_wrap=True)
        grid.add_column(overflow="fold", ratio=1)
        for label, value in rows:
            grid.add_row(Text(label), Text(value))
        console.print(grid)
        return
    for label, value in rows:
        console.print(Text.assemble((f"{label:<{width}}", "cyan"), value), soft_wrap=True)


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else one_line(str(value))


def _coloured(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _printable(text: str) -> str:
    """Text that cannot drive the terminal: control characters other than line ends are shown as ·."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "·" for letter in text)
