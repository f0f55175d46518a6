"""What the engine tells the outside: plain events. The terminal draws them, `--json` prints the result,
a test records them. The engine never prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Observer:
    """Ignores every event; subclasses override what they want to see.

    Nothing that goes through an observer holds patient text: no row's content, no answer.
    """

    def on_notice(self, text: str) -> None:
        """One line worth knowing (a fallback taken, rows skipped)."""

    def on_warning(self, text: str) -> None:
        """One line that may be a mistake of the user's."""

    def on_task_start(self, task: str, total: int | None = None, unit: str = "") -> None:
        """A bounded piece of work begins (reading, loading weights, merging, answering)."""

    def on_task_advance(self, task: str, done: int) -> None:
        """`done` of the task's total so far."""

    def on_task_end(self, task: str) -> None:
        """The piece of work is over."""

    def on_data(self, report: Mapping[str, Any]) -> None:
        """What the data layer found: counts, formats, skipped rows by reason, lengths."""

    def on_train_start(self, plan: Mapping[str, Any]) -> None:
        """Training begins: steps, epochs, trainable parameters, device, dtype, run folder."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """One log step of training."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """One measurement on held-out data."""

    def on_checkpoint(self, step: int, path: str) -> None:
        """A checkpoint is complete on disk."""

    def on_train_end(self, result: Mapping[str, Any]) -> None:
        """Training is over."""
