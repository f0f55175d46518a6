"""`report.html`: a run for people, in one file without scripts, made from run.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.run import metrics
from medicalgpt_cli.engine.run.curves import Line, bars, chart, smoothed
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.engine.run.page import answer_text, document, duration, escape, table, utc
from medicalgpt_cli.engine.run.summary import change_text, data_parts, length_rows, part_table, source_rows

# (key of a measurement, what it is called)
_MEASURES = (
    ("loss", "held-out loss"),
    ("perplexity", "perplexity"),
    ("bits_per_byte", "bits per byte"),
    ("reward", "held-out reward"),
    ("kl", "KL to the start, nats"),
    ("answer_tokens", "tokens an answer"),
)
_LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
_STAGES = {
    "sft": "Instruction tuning",
    "pretrain": "Pretraining",
    "reward": "Reward model",
    "rl": "Reinforcement learning",
}


def write_report(run: RunFolder) -> Path:
    """Write the run's report from what lies in its folder; it can be written again at any time."""
    return atomic_write(run.report, page(run.read(), metrics.read(run.metrics), run.path.name))


def page(manifest: Mapping[str, Any], records: Sequence[Mapping[str, Any]], name: str) -> str:
    """The whole page. Every text that comes from outside is escaped."""
    sections = (
        _headline(manifest, records, name),
        _curves(manifest, records),
        _answers(manifest),
        _data(manifest),
        _settings(manifest),
        _origin_of_the_model(manifest),
        _environment(manifest.get("environment") or {}),
    )
    return document(f"{manifest['stage']} · {manifest['model']}", sections)


def _headline(manifest: Mapping[str, Any], records: Sequence[Mapping[str, Any]], name: str) -> str:
    result = manifest.get("result") or {}
    before = _before(manifest)
    after = result.get("after") or {}
    change = result.get("change") or {}
    cards = [_card(key, label, before.get(key), after.get(key), change.get(key)) for key, label in _MEASURES]
    steps = result.get("steps") or max((record.get("step", 0) for record in records), default=0)
    facts = [f"{steps:,} steps" if steps else "", duration(result.get("seconds"))]
    speed = result.get("tokens_per_second") or _mean(metrics.series(records, "target_tokens_per_second"))
    facts += [f"{speed:,.0f} target tokens/s" if speed else "", utc(manifest.get("started"))]
    stage = _STAGES.get(manifest["stage"], manifest["stage"])
    status = escape(manifest.get("status", ""))
    return (
        f'<header><div class="over">medgpt · {escape(stage)}</div><h1>{escape(manifest["model"])}</h1>'
        f'<p><span class="status {status}">{status}</span> '
        f'<span class="soft">{escape(" · ".join(filter(None, facts)))}</span></p>'
        f'<p class="soft"><code>{escape(name)}</code></p>'
        f'<div class="cards">{"".join(cards)}</div>{_by_part(before, after, change)}</header>'
    )


def _by_part(before: Mapping[str, Any], after: Mapping[str, Any], change: Mapping[str, Any]) -> str:
    """The held-out figures by source, and for a reward model by which answer is longer."""
    head, rows = part_table(before, after, change)
    if not rows:
        return ""
    found = table([_figures(row) for row in rows], _figures(head))
    by_length = [_figures(row, 2) for row in length_rows(after)]
    if by_length:
        found += table(
            by_length, _figures(["held-out pairs", "the chosen answer is", "pairs", "accuracy"], 2)
        )
    return found


def _figures(row: Sequence[str], words: int = 1) -> list[Any]:
    """A row whose first `words` cells are text and the others numbers."""
    return [*row[:words], *((cell, "number") for cell in row[words:])]


def _before(manifest: Mapping[str, Any]) -> Mapping[str, float]:
    """The held-out measurement from before the first step; a run that did not end has it all the same."""
    result = manifest.get("result") or {}
    return result.get("before") or (manifest.get("before") or {}).get("metrics") or {}


def _card(
    key: str, label: str, before: float | None, after: float | None, paired: Mapping[str, Any] | None
) -> str:
    if before is None and after is None:
        return ""
    change = ""
    if before and after is not None and key in _LESS_IS_BETTER:
        percent = 100 * (after - before) / before
        text = f"{percent:+.1f} %".replace("-", "−")
        change = f'<div class="{"good" if percent < 0 else "bad"}">{text}</div>'
    digits = {"perplexity": 2, "answer_tokens": 1}.get(key, 4)
    old = f'<span class="from">{before:,.{digits}f} → </span>' if None not in (before, after) else ""
    if paired:
        interval = escape(change_text(paired, digits))
        change += f'<div class="soft">difference, 95 %: {interval}</div>'
    value = f"{after if after is not None else before:,.{digits}f}"
    figures = f'<div class="name">{label}</div><div class="value">{old}{value}</div>'
    return f'<div class="card">{figures}{change}</div>'


def _curves(manifest: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    before = _before(manifest)

    def held_out(key: str) -> Line:
        """The measurements during training, behind the one before the first step."""
        first = [(0, before[key])] if before.get(key) is not None else []
        return Line("held out", [*first, *metrics.series(records, f"eval_{key}")], "second", markers=True)

    if manifest["stage"] == "rl":
        drawn = [
            chart("Reward", [*noisy("training", records, "reward"), held_out("reward")], "mean of a batch"),
            chart("KL to the start", noisy("", records, "kl"), "nats an answer"),
            chart("Length", noisy("", records, "answer_tokens"), "tokens an answer"),
            chart("Ended by itself", noisy("", records, "ended"), "share of answers"),
            chart("Entropy", noisy("", records, "entropy"), "nats a token"),
            chart("Different word pairs", noisy("", records, "distinct_2"), "share of all pairs"),
            chart("Value loss", noisy("", records, "value_loss")),
            chart("Explained variance", noisy("", records, "explained_variance"), "of the returns"),
            chart("Clipped", noisy("", records, "clip_fraction"), "share of tokens"),
            chart("One reward", noisy("", records, "frac_reward_zero_std"), "share of prompts"),
            chart("Clipped scores", noisy("", records, "score_clip_fraction"), "share of answers"),
            chart("Speed", noisy("", records, "answers_per_second"), "answers a second"),
        ]
        return f'<section><h2>Curves</h2><div class="curves">{"".join(drawn)}</div></section>'
    unit = "nats a pair" if manifest["stage"] == "reward" else "nats a target token"
    drawn = [
        chart("Loss", [*noisy("training", records, "loss"), held_out("loss")], unit),
        chart("Bits per byte", [held_out("bits_per_byte")], "of held-out text"),
        chart("Accuracy", noisy("", records, "accuracy"), "training pairs, by log step"),
        chart("Margin", noisy("", records, "margin"), "chosen − rejected score"),
        chart("Learning rate", [Line("", metrics.series(records, "learning_rate"))]),
        chart("Gradient norm", noisy("", records, "grad_norm"), "before clipping"),
        chart("Speed", noisy("", records, "target_tokens_per_second"), "target tokens a second"),
        chart("Speed", noisy("", records, "pairs_per_second"), "pairs a second"),
        chart("Speed", noisy("", records, "answers_per_second"), "answers a second"),
    ]
    for part in data_parts(manifest.get("data") or {}):
        if part.name.startswith("training"):
            lengths = [(f"{bar['from']:,}–{bar['to']:,}", bar["count"]) for bar in part.histogram]
            drawn.append(bars("Lengths", lengths, part.name, "tokens"))
    if not any(drawn[:-1]):
        drawn.insert(0, '<p class="soft">No step was logged.</p>')
    return f'<section><h2>Curves</h2><div class="curves">{"".join(drawn)}</div></section>'


def noisy(name: str, records: Sequence[Mapping[str, Any]], key: str) -> list[Line]:
    """A curve that jumps from step to step: its running mean, in front of the values themselves."""
    points = metrics.series(records, key)
    if len(points) <= 20:
        return [Line(name, points)]
    return [
        Line("each log step" if name else "", points, "faint"),
        Line("smoothed" if name else "", smoothed(points)),
    ]


def _answers(manifest: Mapping[str, Any]) -> str:
    samples = (manifest.get("result") or {}).get("samples") or []
    if not samples:
        return ""
    blocks = []
    for sample in samples:
        reference = sample.get("reference")
        told = f"<summary>reference answer</summary><div>{escape(reference)}</div>"
        details = f'<details class="reference">{told}</details>' if reference else ""
        blocks.append(
            f'<div class="answers"><div class="question">{escape(sample.get("question", ""))}</div>'
            f'<div class="pair"><div class="before"><b>before</b>{answer_text(sample.get("before"))}</div>'
            f'<div class="after"><b>after</b>{answer_text(sample.get("after"))}</div></div>{details}</div>'
        )
    return f"<section><h2>Held-out questions, before and after</h2>{''.join(blocks)}</section>"


def _data(manifest: Mapping[str, Any]) -> str:
    if not manifest.get("data"):
        return ""
    blocks = []
    for part in data_parts(manifest["data"]):
        facts = " · ".join(f"{value} {label}" for label, value in part.facts)
        formats = f" <small>({escape(', '.join(part.formats))})</small>" if part.formats else ""
        blocks.append(f"<h3>{escape(part.name.capitalize())}</h3><p>{escape(facts)}{formats}</p>")
        rows = [
            ((kind, "kind"), (f"{count:,}", "number"), reason, ", ".join(positions[:3]))
            for kind, reason, count, positions in part.reasons
        ]
        if rows:
            blocks.append(table(rows, ("", ("rows", "number"), "why", "for example")))
        elif not part.notices:
            blocks.append('<p class="soft">Every row was used as it stands.</p>')
        blocks += [f'<p class="soft">{escape(notice)}</p>' for notice in part.notices]
    sources = [
        (name, *((figure, "number") for figure in rest)) for name, *rest in source_rows(manifest["data"])
    ]
    if sources:
        names = ("size", "tokens", "of an epoch", "passes an epoch")
        blocks.append(f"<h3>Mix</h3>{table(sources, ('source', *((name, 'number') for name in names)))}")
    return f"<section><h2>Data</h2>{''.join(blocks)}</section>"


def _settings(manifest: Mapping[str, Any]) -> str:
    chosen, defaults = [], []
    for name, entry in manifest.get("settings", {}).items():
        value = entry["value"]
        shown = (
            ", ".join(map(str, value))
            if isinstance(value, list)
            else {True: "yes", False: "no"}.get(value, value)
        )
        row = (name.replace("_", "-"), "–" if shown in (None, "") else str(shown), entry["origin"])
        (defaults if entry["origin"] == "default" else chosen).append(row)
    head = ("setting", "value", "from")
    first = table(chosen, head, "chosen") if chosen else '<p class="soft">All settings are defaults.</p>'
    summary = f"<summary>{len(defaults)} settings at their defaults</summary>"
    rest = f"<details>{summary}{table(defaults, head)}</details>"
    return f"<section><h2>Settings</h2>{first}{rest if defaults else ''}</section>"


def _origin_of_the_model(manifest: Mapping[str, Any]) -> str:
    rows = [*_flat("", manifest.get("parents") or {}), *_flat("", manifest.get("fingerprints") or {})]
    if not rows:
        return ""
    return _folded("Where it comes from", "parents and fingerprints", rows)


def _environment(environment: Mapping[str, Any]) -> str:
    rows = list(_flat("", environment))
    return _folded("Environment", "versions and machine", rows) if rows else ""


def _folded(title: str, summary: str, rows: Sequence[Sequence[Any]]) -> str:
    return f"<section><h2>{title}</h2><details><summary>{summary}</summary>{table(rows)}</details></section>"


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    """Nested data as (dotted name, text) rows; empty ones are left out."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), one)
    elif isinstance(value, list) and any(isinstance(one, (Mapping, list)) for one in value):
        for index, one in enumerate(value):
            yield from _flat(f"{prefix}.{index}" if prefix else str(index), one)
    elif value not in (None, "", []):
        large = isinstance(value, int) and value >= 2**20 and not isinstance(value, bool)
        text = f"{value / 2**30:,.1f} GiB" if large else value
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(text)


def _mean(points: Sequence[tuple[float, float]]) -> float | None:
    return sum(value for _, value in points) / len(points) if points else None
