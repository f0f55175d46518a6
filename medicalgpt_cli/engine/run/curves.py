"""Line charts as inline SVG: axes, round ticks, labels; colours come from the page's classes."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

# One chart is drawn in these units; on a phone one unit is about one pixel, so the text stays readable.
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 34
_MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One line of a chart. `style` is a class of the page: main, faint or second."""

    name: str
    points: Points
    style: str = "main"
    markers: bool = False


def chart(title: str, lines: Sequence[Line], note: str = "") -> str:
    """A figure with its caption and legend; empty text where no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks = ticks(min(xs), max(xs), 6, whole=True)
    y_ticks = ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{number(tick)}</text>'
        )
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _RIGHT}" y2="{base}"/>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<line class="axis" x1="{x}" y1="{base}" x2="{x}" y2="{base + 4}"/>')
            parts.append(
                f'<text class="tick" x="{x}" y="{base + 17}" text-anchor="middle">{number(tick)}</text>'
            )
    parts.append(f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">step</text>')
    for line in lines:
        parts += _drawn(line, place)
    return _figure(
        title,
        note,
        "".join(parts),
        f"from step {number(min(xs))} to {number(max(xs))}",
        "".join(
            f'<span class="key {line.style}">{html.escape(line.name)}</span>' for line in lines if line.name
        ),
    )


def bars(title: str, values: Sequence[tuple[str, int]], note: str = "", unit: str = "") -> str:
    """A histogram; `values` are (label, count). Empty text where there is nothing to count."""
    largest = max((count for _, count in values), default=0)
    if not largest:
        return ""
    base, room = _HEIGHT - _BOTTOM, (_WIDTH - _LEFT - _RIGHT) / len(values)
    y_ticks = ticks(0, largest, 5, whole=True)
    parts = []
    for tick in y_ticks:
        y = round(base - tick / y_ticks[-1] * (base - _TOP), 1)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{number(tick)}</text>'
        )
    for index, (label, count) in enumerate(values):
        tall = count / y_ticks[-1] * (base - _TOP)
        x, y = _LEFT + index * room + 1, base - tall
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{room - 2:.1f}" height="{tall:.1f}">'
            f"<title>{html.escape(label)}: {count:,}</title></rect>"
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _RIGHT}" y2="{base}"/>')
    for index in range(0, len(values), max(1, len(values) // 5)):
        x, first = _LEFT + index * room, values[index][0].split("–")[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 17}">{html.escape(first)}</text>')
    parts.append(
        f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{unit}</text>'
    )
    return _figure(title, note, "".join(parts), f"{len(values)} bars, the largest {largest:,}")


def _figure(title: str, note: str, drawing: str, about: str, legend: str = "") -> str:
    caption = (
        f"<figcaption><b>{html.escape(title)}</b>{legend}<small>{html.escape(note)}</small></figcaption>"
    )
    label = html.escape(f"{title}, {about}", quote=True)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{drawing}</svg>'
    return f"<figure>{caption}{svg}</figure>"


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The mean of a noisy curve around each point, over a twentieth of its length; it does not lag behind."""
    reach = max(2, len(points) // 40)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    result = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)  # as many on both sides, also at the ends
        result.append((x, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return result


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label: short, without trailing zeros."""
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def _thinned(points: Points) -> Points:
    """At most _MOST_POINTS of the points, the last one always among them."""
    stride = math.ceil(len(points) / _MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _drawn(line: Line, place) -> list[str]:
    points = _thinned(line.points)
    path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
    parts = [f'<polyline class="line {line.style}" points="{path}"/>'] if len(points) > 1 else []
    if line.markers or len(points) == 1:
        for x, y in points:
            across, down = place(x, y)
            tip = f"<title>step {number(x)}: {y:.4f}</title>"
            parts.append(f'<circle class="dot {line.style}" cx="{across}" cy="{down}" r="3.2">{tip}</circle>')
    return parts
