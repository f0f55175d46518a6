"""The training panel and the bars of bounded work: the one place that draws while something runs."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_BARS = "▁▂▃▄▅▆▇█"
_WINDOW = 50  # log steps that the estimate of the time left looks back on


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` in at most `width` characters; each is the mean of its share of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [round(index * len(finite) / count) for index in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high - low < 1e-12:
        return _BARS[3] * count
    return "".join(_BARS[int((mean - low) / (high - low) * (len(_BARS) - 1) + 0.5)] for mean in means)


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss; a dash where they are not known."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, second = divmod(int(max(seconds, 0) + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


def size(count: float | None) -> str:
    """Bytes as GiB or MiB."""
    if count is None:
        return "–"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def quantity(count: float) -> str:
    """A count in three digits: 4.9 M, 812 k."""
    for limit, suffix in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if count >= limit:
            return f"{count / (1e3 if suffix == ' k' else limit):.3g}{suffix}"
    return f"{count:,.0f}"


class TrainingState:
    """What is known of a running training; fed by events, read by the panel and the plain lines."""

    def __init__(self, plan: Mapping[str, Any]):
        """`plan` as the engine gives it; `steps` is the last step, `from_step` where a resume begins."""
        self.plan = plan
        self.total = int(plan.get("steps") or 0)
        self.step = int(plan.get("from_step") or 0)
        self.started = time.monotonic()
        self.latest: dict[str, float] = {}
        self.main = "reward" if plan.get("stage") == "rl" else "loss"  # what the curves show
        self.course: list[float] = []
        self.evals: list[float] = []
        self.eval: dict[str, float] = {}
        self.checkpoint: int | None = None
        if plan.get("before"):
            self.add_eval(self.step, plan["before"])
        self._times: deque[tuple[int, float]] = deque([(self.step, self.started)], maxlen=_WINDOW)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        self.latest.update(metrics)
        self._times.append((step, time.monotonic()))
        if metrics.get(self.main) is not None:
            self.course.append(float(metrics[self.main]))

    def add_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        # both spellings: the measurement's own, and that of metrics.jsonl
        self.eval = {name.removeprefix("eval_"): value for name, value in metrics.items()} | {"step": step}
        if self.eval.get(self.main) is not None:
            self.evals.append(float(self.eval[self.main]))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds until the last step, by the speed of the last log steps; None before the first."""
        (first, began), (last, ended) = self._times[0], self._times[-1]
        if last <= first or not self.total:
            return None
        estimate = (self.total - last) * (ended - began) / (last - first)
        return max(estimate - (time.monotonic() - ended), 0.0)

    @property
    def memory(self) -> float:
        from medicalgpt_cli.engine.run.environment import memory_used

        reported = self.latest.get("memory")
        return reported if reported is not None else memory_used(str(self.plan.get("device", "cpu")))

    def metrics_line(self) -> str:
        """One log step as a plain line."""
        parts = [f"step {self.step}/{self.total}"]
        for name, label in (
            ("epoch", "epoch"),
            ("loss", "loss"),
            ("learning_rate", "lr"),
            ("grad_norm", "grad"),
            ("reward", "reward"),
            ("kl", "KL"),
            ("answer_tokens", "tokens an answer"),
        ):
            if self.latest.get(name) is not None:
                parts.append(f"{label} {_number(name, self.latest[name])}")
        if self.latest.get("accuracy") is not None:
            parts.append(f"accuracy {self.latest['accuracy']:.2f}")
        label, speed = _speed(self.latest)
        if speed:
            parts.append(f"{speed} {label}")
        return "  ".join([*parts, f"left {duration(self.left)}"])

    def eval_line(self) -> str:
        """The last measurement as a plain line."""
        parts = [f"step {self.eval['step']}"]
        for name, label in (
            ("loss", "held-out loss"),
            ("perplexity", "perplexity"),
            ("bits_per_byte", "bits/byte"),
            ("reward", "held-out reward"),
            ("kl", "KL"),
            ("answer_tokens", "tokens an answer"),
        ):
            if self.eval.get(name) is not None:
                parts.append(f"{label} {self.eval[name]:.4f}")
        return "  ".join(parts)


def panel(state: TrainingState, width: int, running: bool = True) -> RenderableType:
    """The training panel, at most 100 columns wide and good from 60."""
    from rich import box
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    inner = min(width, 100) - 4
    share = f"{100 * state.step / state.total:.0f}%" if state.total else ""
    head = Table.grid(expand=True, padding=(0, 2, 0, 0))
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=max(state.total, 1), completed=state.step, complete_style="green")
    head.add_row(Text(f"step {state.step:,}/{state.total:,}", style="bold"), bar, share)

    body = Table.grid(expand=True, padding=(0, 1, 0, 0))
    for kind in ("label", "value", "label", "value"):
        body.add_column(
            no_wrap=True, style="dim" if kind == "label" else "", ratio=None if kind == "label" else 1
        )
    latest = state.latest
    body.add_row("elapsed", duration(state.elapsed), "time left", duration(state.left))
    body.add_row("epoch", _shown(latest, "epoch"), "learning rate", _shown(latest, "learning_rate"))
    label, speed = _speed(latest)
    body.add_row(label, speed or "–", "memory", size(state.memory))
    body.add_row("gradient norm", _shown(latest, "grad_norm"), "checkpoint", _checkpoint(state))

    curves = Table.grid(padding=(0, 1, 0, 0))
    for column in ("dim", "bold", ""):
        curves.add_column(no_wrap=True, style=column)
    room = max(inner - 15 - 8 - 22, 8)
    curves.add_row(state.main, _shown(latest, state.main), Text(sparkline(state.course, room), style="cyan"))
    held_out = Text(sparkline(state.evals, room), style="magenta")
    if state.eval.get("perplexity") is not None:
        held_out.append(f" perplexity {state.eval['perplexity']:.2f}", style="dim")
    curves.add_row(f"held-out {state.main}", _shown(state.eval, state.main), held_out)
    if state.main == "reward":
        curves.add_row("KL to the start", _shown(latest, "kl"), "nats an answer")
        curves.add_row("answer", _shown(latest, "answer_tokens"), "tokens")

    grid = Table.grid(expand=True)
    for row in (head, Text(), curves, body):
        grid.add_row(row)
    return Panel(
        grid,
        title=Text(_title(state.plan), style="bold"),
        title_align="left",
        subtitle=Text("Ctrl-C saves and stops", style="dim") if running else None,
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="dim",
        width=min(width, 100),
    )


class Screen:
    """The live part of the terminal: the training panel, if any, above the bars of bounded work."""

    def __init__(self, console: Console):
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.training: TrainingState | None = None
        self._console = console
        self._ids: dict[str, Any] = {}
        self._bars = Progress(
            SpinnerColumn(style="cyan"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, complete_style="green"),
            TaskProgressColumn(),
            TextColumn("{task.fields[unit]}", markup=False, style="dim"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=4,
            transient=True,
            # A result that goes to a file or a pipe must not be caught and put on the screen.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()

    def start_task(self, task: str, total: int | None, unit: str) -> None:
        self._ids[task] = self._bars.add_task(task, total=total, unit=unit)

    def advance_task(self, task: str, done: int) -> None:
        self._bars.update(self._ids[task], completed=done)

    def end_task(self, task: str) -> None:
        self._bars.remove_task(self._ids.pop(task))

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.constrain import Constrain

        # The terminal echoes Ctrl-C as ^C at the end of the last line; there must be room for it.
        width = self._console.width - 3
        parts: list[RenderableType] = []
        if self.training is not None:
            parts.append(panel(self.training, width))
        if self._ids:
            parts.append(self._bars)
        return Constrain(Group(*parts), width)


def start_lines(plan: Mapping[str, Any]) -> list[str]:
    """What is about to be trained, and where it goes."""
    parts = []
    if plan.get("trainable") is not None:
        of = f" of {quantity(plan['parameters'])}" if plan.get("parameters") else ""
        parts.append(f"{quantity(plan['trainable'])}{of} parameters learn")
    for name, text in (
        ("steps", "{:,} steps"),
        ("device", "{}"),
        ("processes", "{} processes"),
        ("dtype", "{}"),
        ("quantization", "base in {}"),
    ):
        if plan.get(name) is not None:
            parts.append(text.format(plan[name]))
    lines = [" · ".join(parts)] if parts else []
    if plan.get("from_step"):
        lines.append(f"goes on after step {plan['from_step']:,}")
    if plan.get("folder"):
        lines.append(f"run folder {plan['folder']}")
    return lines


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """Counts of the data, with every reason for a row that is not used as it stands."""
    from medicalgpt_cli.engine.run.summary import data_parts, source_rows

    lines = []
    for part in data_parts(report):
        facts = [f"{value} {label}" for label, value in part.facts]
        lines.append(
            f"{part.name}: {' · '.join(facts)}" + (f" ({', '.join(part.formats)})" if part.formats else "")
        )
        lines.extend(f"· {number:,} {kind}: {reason}" for kind, reason, number, _ in part.reasons)
        lines.extend(f"· {notice}" for notice in part.notices)
    for name, size, tokens, share, passes in source_rows(report):
        lines.append(f"{name}: {size} · {tokens} tokens · {share} of an epoch, {passes} passes over it")
    if report.get("end_of_text"):
        lines.append(f"documents end with {report['end_of_text']}")
    return lines


def end_lines(result: Mapping[str, Any]) -> list[str]:
    """Held-out figures before and after, and where the report is."""
    from medicalgpt_cli.engine.run.summary import change_text, interval_text, part_table

    lines = []
    before, after, change = (result.get(name) or {} for name in ("before", "after", "change"))
    for name, label in (
        ("loss", "held-out loss"),
        ("perplexity", "perplexity"),
        ("bits_per_byte", "bits per byte"),
        ("reward", "held-out reward"),
        ("kl", "KL to the start"),
        ("answer_tokens", "tokens/answer"),
        ("ended", "ended"),
    ):
        if before.get(name) is not None and after.get(name) is not None:
            known = []
            if f"{name}_low" in after:
                known.append(f"95 %: {interval_text(after[f'{name}_low'], after[f'{name}_high'], 4)}")
            if change.get(name):
                known.append(f"difference, 95 %: {change_text(change[name], 4)}")
            said = f"  ({'; '.join(known)})" if known else ""
            lines.append(f"{label:<14} {before[name]:.4f} → {after[name]:.4f}{said}")
    head, rows = part_table(before, after, change)
    for row in rows:
        figures = " · ".join(f"{name} {cell}" for name, cell in zip(head[1:], row[1:], strict=True))
        lines.append(f"{row[0]}: {figures}")
    if result.get("folder"):
        lines.append(f"report         {result['folder']}/report.html")
    return lines


def _speed(latest: Mapping[str, float]) -> tuple[str, str]:
    """What a stage counts a second, and the figure; empty before the first step."""
    for unit in ("pairs", "answers"):
        if latest.get(f"{unit}_per_second") is not None:
            return f"{unit}/s", f"{latest[f'{unit}_per_second']:.2f}"
    figure = latest.get("target_tokens_per_second")
    return "target tokens/s", "" if figure is None else f"{figure:,.0f}"


def _title(plan: Mapping[str, Any]) -> str:
    return " · ".join(str(plan[name]) for name in ("stage", "model") if plan.get(name)) or "training"


def _checkpoint(state: TrainingState) -> str:
    return f"step {state.checkpoint:,}" if state.checkpoint is not None else "–"


def _shown(values: Mapping[str, float], name: str) -> str:
    return "–" if values.get(name) is None else _number(name, values[name])


def _number(name: str, value: float) -> str:
    formats = {
        "learning_rate": "{:.2e}",
        "grad_norm": "{:.3g}",
        "epoch": "{:.2f}",
        "answer_tokens": "{:.1f}",
    }
    return formats.get(name, "{:.4f}").format(value)
