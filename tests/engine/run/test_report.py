"""The report: complete, self-contained, and harmless whatever the model answered."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medicalgpt_cli.engine.run import metrics
from medicalgpt_cli.engine.run.curves import Line, bars, chart, number, smoothed, ticks
from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.engine.run.report import write_report
from medicalgpt_cli.settings.stages import SftSettings

VOID = {"meta", "link", "br", "img"}
ATTACK = "</div><script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that each element is closed."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path):
    settings = SftSettings(
        train_data=("train.jsonl",), base_model="tiny", seed=7, output_dir=tmp_path / "run",
        origins={"seed": "environment", "train_data": "flag"},
    )  # fmt: skip
    with RunFolder.create("sft", f"tiny{ATTACK}", settings) as run:
        yield run


def fill(run: RunFolder) -> None:
    for step in range(1, 61):
        metrics.append(
            run.metrics, {"step": step, "loss": 3 - step / 40, "learning_rate": 1e-4, "grad_norm": 1.0}
        )
    metrics.append(run.metrics, {"step": 60, "eval_loss": 1.5, "eval_bits_per_byte": 0.75})
    part = {
        "read": 20, "used": 18, "skipped": {"the answer is empty": 2}, "truncated": {"the end is cut": 3},
        "merged": {"consecutive user turns": 4}, "places": {"the answer is empty": ["train.jsonl:4"]},
        "formats": {"train.jsonl": "alpaca"}, "histogram": [{"from": 0, "to": 9, "count": 18}],
    }  # fmt: skip
    run.update(data={"training": part, "held_out": {"read": 5, "used": 5}})
    sample = {"question": f"问题 {ATTACK}", "reference": ATTACK, "before": ATTACK, "after": "好 & <b>"}
    before, after = {"loss": 3.0, "perplexity": 20.09}, {"loss": 1.5, "perplexity": 4.48}
    run.finish("done", {"steps": 60, "seconds": 75.0, "before": before, "after": after, "samples": [sample]})


def test_the_report_says_what_a_person_asks(run: RunFolder) -> None:
    fill(run)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    for expected in (
        "Instruction tuning", "done", "60 steps", "1 min 15 s", "3.0000 → 1.5000", "−50.0 %", "20.09 → 4.48",
        "the answer is empty", "train.jsonl:4", "the end is cut", "consecutive user turns", "alpaca",
        "seed", "environment", "torch", "问题", "好 & <b>",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert sum(tag == "svg" for tag, _ in page.tags) == 5  # loss, bits per byte, rate, gradient, lengths


def test_nothing_foreign_runs_or_is_fetched(run: RunFolder) -> None:
    fill(run)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "b onerror"}
    for _, attributes in page.tags:
        assert not {"src", "href", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert ATTACK in page.text  # it is shown, as text
    policy = [attributes.get("content", "") for tag, attributes in page.tags if tag == "meta"]
    assert any(content.startswith("default-src 'none'") for content in policy)


def test_a_run_that_has_just_begun_has_a_report_too(run: RunFolder) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "running" in page.text and "No step was logged" in page.text
    run.update(before={"metrics": {"loss": 3.25}, "answers": []})
    run.finish("stopped", {"steps": 0})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "3.2500" in page.text and "stopped" in page.text


def test_broken_numbers_do_not_break_the_curves(run: RunFolder) -> None:
    run.metrics.write_text(
        "\n".join(json.dumps({"step": step, "loss": None if step == 2 else 1.0}) for step in (1, 2, 3))
    )
    page = Page(write_report(run).read_text(encoding="utf-8"))
    lines = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    assert len(lines) == 1 and len(lines[0].split()) == 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4, [0, 1, 2, 3, 4]), (0.61, 1.12, [0.6, 0.8, 1.0, 1.2]), (2, 2, [1.8, 1.9, 2.0, 2.1, 2.2])],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == expected


def test_step_ticks_are_whole_numbers() -> None:
    assert all(tick == int(tick) for tick in ticks(1, 3, 6, whole=True))


@pytest.mark.parametrize(("value", "text"), [(0.0002, "2e-4"), (1500, "1,500"), (0.75, "0.75"), (0, "0")])
def test_tick_labels_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_smoothing_keeps_a_constant_and_flattens_noise() -> None:
    constant = [(step, 2.0) for step in range(100)]
    assert all(math.isclose(y, 2.0) for _, y in smoothed(constant))
    noisy = smoothed([(step, 1.0 + (-1) ** step) for step in range(100)])
    assert all(0.6 < y < 1.4 for _, y in noisy[2:-2])
    slope = [(step, float(step)) for step in range(200)]
    assert all(math.isclose(x, y, abs_tol=1e-9) for x, y in smoothed(slope))  # it does not lag


def test_points_stay_inside_the_chart_and_long_curves_are_thinned() -> None:
    points = [(step, math.sin(step / 500) * 1e-3) for step in range(5000)]
    page = Page(chart("A", [Line("", points)]))
    drawn = next(attributes["points"] for tag, attributes in page.tags if tag == "polyline").split()
    assert 300 <= len(drawn) <= 402
    for pair in drawn:
        x, y = map(float, pair.split(","))
        assert 54 <= x <= 406 and 12 <= y <= 196
    assert drawn[-1].startswith("406.0,")  # the last step is there


def test_nothing_to_draw_is_no_figure() -> None:
    assert chart("A", [Line("", [])]) == "" and bars("A", []) == ""
