"""`report.html` of a pipeline: lineage, figures before and after, curves of each stage, answers side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.pipeline.figures import figures
from medicalgpt_cli.engine.pipeline.recipe import TRAINING, Pipeline
from medicalgpt_cli.engine.pipeline.state import State
from medicalgpt_cli.engine.run import manifest, metrics
from medicalgpt_cli.engine.run.curves import Line, chart
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.engine.run.page import answer_text, document, duration, escape, table
from medicalgpt_cli.engine.run.report import noisy

_CURVES = (
    ("loss", "loss", "nats a target token"),
    ("accuracy", "accuracy", "training pairs"),
    ("reward", "reward", "mean of a batch"),
    ("kl", "KL to the start", "nats an answer"),
    ("answer_tokens", "length", "tokens an answer"),
)
_MOST_ANSWERS = 12


def write_report(pipeline: Pipeline, folder: Path, state: State) -> Path:
    """Write the page from what the steps left; every step has to be done."""
    runs = {
        step.name: Path(state.steps[step.name].output) for step in pipeline.steps if step.command in TRAINING
    }
    manifests = {name: manifest.read(path) for name, path in runs.items()}
    sections = [
        _headline(pipeline, folder, state),
        _figures(manifests),
        _lineage(pipeline, folder, state),
        _curves(manifests, {name: metrics.read(path / "metrics.jsonl") for name, path in runs.items()}),
        _answers(pipeline, state),
        *(_samples(name, one) for name, one in manifests.items()),
    ]
    return atomic_write(folder / "report.html", document(f"pipeline · {folder.name}", sections))


def _headline(pipeline: Pipeline, folder: Path, state: State) -> str:
    seconds = sum(state.steps[step.name].seconds for step in pipeline.steps)
    facts = f"{len(pipeline.steps)} steps · {duration(seconds)}"
    return (
        f'<header><div class="over">medgpt · Pipeline</div><h1>{escape(folder.name)}</h1>'
        f'<p><span class="status done">done</span> <span class="soft">{escape(facts)}</span></p></header>'
    )


def _figures(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            one.step,
            one.name,
            (one.before, "number"),
            (one.after, "number good" if one.better else "number bad" if one.better is False else "number"),
            (one.interval, "number"),
            (one.difference, "number"),
        )
        for name, run in manifests.items()
        for one in figures(name, run)
    ]
    numbers = ("before", "after", "95 %", "difference, 95 %")
    head = ("step", "held-out figure", *((name, "number") for name in numbers))
    return f"<section><h2>Before and after, on data that was not trained on</h2>{table(rows, head)}</section>"


def _lineage(pipeline: Pipeline, folder: Path, state: State) -> str:
    rows = []
    for step in pipeline.steps:
        done = state.steps[step.name]
        place = Path(done.output)
        shown = place.relative_to(folder) if place.is_relative_to(folder) else place
        # A step that was taken over from an earlier call keeps the time that it took then.
        rows.append((step.name, step.command, ", ".join(step.needs), str(shown), duration(done.seconds)))
    head = ("step", "command", "builds on", "leaves", "took")
    return f"<section><h2>Lineage</h2>{table(rows, head)}</section>"


def _curves(
    manifests: Mapping[str, Mapping[str, Any]], records: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    drawn = []
    for name, run in manifests.items():
        before = (run.get("result") or {}).get("before") or {}
        for key, title, unit in _CURVES:
            if key == "loss" and run["stage"] == "rl":  # of the clipped objective, which says little
                continue
            first = [(0, before[key])] if isinstance(before.get(key), (int, float)) else []
            held_out = Line(
                "held out", [*first, *metrics.series(records[name], f"eval_{key}")], "second", markers=True
            )
            drawn.append(chart(f"{name}: {title}", [*noisy("training", records[name], key), held_out], unit))
    return f'<section><h2>Curves</h2><div class="curves">{"".join(drawn)}</div></section>'


def _answers(pipeline: Pipeline, state: State) -> str:
    """Steps that answered the same questions, side by side."""
    answered: dict[str, dict[str, str]] = {}
    for step in pipeline.steps:
        if step.command != "infer":
            continue
        for line in Path(state.steps[step.name].output).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            answered.setdefault(row["input"], {})[step.name] = row.get("output")
    blocks = [_block(question, answers) for question, answers in list(answered.items())[:_MOST_ANSWERS]]
    return f"<section><h2>Answers side by side</h2>{''.join(blocks)}</section>" if blocks else ""


def _samples(name: str, run: Mapping[str, Any]) -> str:
    samples = (run.get("result") or {}).get("samples") or []
    blocks = [
        _block(one.get("question", ""), {"before": one.get("before"), "after": one.get("after")})
        for one in samples[:_MOST_ANSWERS]
    ]
    if not blocks:
        return ""
    return f"<section><h2>{escape(name)}: held-out questions</h2>{''.join(blocks)}</section>"


def _block(question: str, answers: Mapping[str, str | None]) -> str:
    last = list(answers)[-1]
    columns = "".join(
        f'<div class="{"after" if name == last else "before"}"><b>{escape(name)}</b>{answer_text(text)}</div>'
        for name, text in answers.items()
    )
    return (
        f'<div class="answers"><div class="question">{escape(question)}</div>'
        f'<div class="pair">{columns}</div></div>'
    )
