"""What `/metrics` says, in Prometheus's text format. Numbers only: no text, no names."""

from __future__ import annotations

from typing import Any


def exposition(scheduler: Any) -> str:
    counters, load = scheduler.counters, scheduler.load
    waits = sorted(counters.first_token_seconds)
    lines = []

    def add(name: str, kind: str, about: str, value: float) -> None:
        lines.extend(
            [f"# HELP medgpt_{name} {about}", f"# TYPE medgpt_{name} {kind}", f"medgpt_{name} {value}"]
        )

    add("requests_total", "counter", "Requests that were taken in.", counters.requests)
    add("requests_refused_total", "counter", "Requests refused because there was no room.", counters.refused)
    add("requests_finished_total", "counter", "Requests that were answered.", counters.finished)
    add("requests_cancelled_total", "counter", "Requests whose client went away.", counters.cancelled)
    add("requests_failed_total", "counter", "Requests that ended with an error.", counters.failed)
    add("prompt_tokens_total", "counter", "Tokens of prompts that were answered.", counters.prompt_tokens)
    add("completion_tokens_total", "counter", "Tokens of answers.", counters.completion_tokens)
    add("steps_total", "counter", "Steps of the model.", counters.steps)
    add(
        "step_rows_total",
        "counter",
        "Answers in these steps: divided by steps, the mean batch.",
        counters.rows,
    )
    add("waiting", "gauge", "Requests that wait.", load["waiting"])
    add("running", "gauge", "Requests that are being answered.", load["running"])
    for name, share in (("median", 0.5), ("p99", 0.99)):
        value = waits[min(int(share * len(waits)), len(waits) - 1)] if waits else 0.0
        add(
            f"first_token_seconds_{name}",
            "gauge",
            "Time to the first token, of the last 1000.",
            round(value, 4),
        )
    return "\n".join(lines) + "\n"
