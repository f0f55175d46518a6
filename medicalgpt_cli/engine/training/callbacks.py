"""What happens beside the training loop: events for the observer, signals, early stopping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import metrics, processes, signals
from medicalgpt_cli.engine.training import together
from medicalgpt_cli.errors import Interrupted

# What the library logs itself; everything else is a stage's own.
_OF_THE_LIBRARY = (
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "seen",
    "total_flos",
    "num_input_tokens_seen",
)


class Reporting(TrainerCallback):
    """Each log step goes to metrics.jsonl and to the observer. `unit` is what speed is counted in."""

    def __init__(self, observer: Observer, metrics_file: Path, unit: str):
        self.observer, self.metrics_file, self.unit = observer, metrics_file, unit
        self.began = self.last = time.monotonic()

    def on_train_begin(self, args, state, control, **_):
        self.began = self.last = time.monotonic()

    def on_log(self, args, state, control, logs=None, **_):
        values = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        if not state.is_world_process_zero:
            return
        if any(name.startswith("eval_") for name in values):
            values = {name: value for name, value in values.items() if name.startswith("eval_")}
            metrics.append(self.metrics_file, {"step": state.global_step, **values})
            self.observer.on_eval(state.global_step, values)
            self.last = time.monotonic()  # measuring is not training time
        elif "loss" in values:
            now = time.monotonic()
            speed = values.get("seen", 0) / max(now - self.last, 1e-9)
            values = {
                "epoch": state.epoch or 0.0,
                "loss": values["loss"],
                "learning_rate": values.get("learning_rate", 0.0),
                "grad_norm": values.get("grad_norm", 0.0),
                f"{self.unit}_per_second": speed,
                "seconds": now - self.began,
                **{name: value for name, value in values.items() if name not in _OF_THE_LIBRARY},
            }
            self.last = now
            metrics.append(self.metrics_file, {"step": state.global_step, **values})
            self.observer.on_metrics(state.global_step, values)

    def on_published(self, step: int, folder: Path) -> None:
        if processes.rank() == 0:
            self.observer.on_checkpoint(step, str(folder))


class StopOnSignal(TrainerCallback):
    """The first signal ends training after the running update, with a checkpoint; a second one ends at once."""

    def __init__(self) -> None:
        self.received = signals.received()  # perhaps while the model was loaded, where a library swallowed it

    @contextmanager
    def listening(self) -> Iterator[StopOnSignal]:

        def note(number: int, _frame: object) -> None:
            if self.received is not None:
                signals.interrupt(number)
            self.received = number

        with signals.handled(note):
            yield self

    @property
    def exit_code(self) -> int:
        return Interrupted(self.received).exit_code if self.received else 0

    @property
    def name(self) -> str:
        return Interrupted(self.received).signal_name if self.received else ""

    def on_step_end(self, args, state, control, **_):
        if together.largest(self.received or 0, args.device):  # all stop after the same update
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False  # whoever stops a run wants it to stop
        return control


class Beginning(TrainerCallback):
    """Calls back once the trainer has set the model up, before the first step."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_train_begin(self, args, state, control, **_):
        self.begin()


class EarlyStopping(TrainerCallback):
    """Asks for a checkpoint at each new lowest held-out loss, and stops when that grows old.

    Everything is read from the trainer's log history, so a resumed run goes on counting where it was.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args, state, control, **_):
        if best_step(state) == state.global_step:
            control.should_save = True
        elif self.reached(state):
            control.should_training_stop = True
        return control

    def reached(self, state: Any) -> bool:
        """Whether the lowest held-out loss is as old as `patience` measurements."""
        best = best_step(state)
        later = [one for one in state.log_history if "eval_loss" in one and one["step"] > (best or 0)]
        return best is not None and len(later) >= self.patience


def best_step(state: Any) -> int | None:
    """The update with the lowest held-out loss so far; None before the first measurement."""
    measured = [(entry["eval_loss"], entry["step"]) for entry in state.log_history if "eval_loss" in entry]
    return min(measured)[1] if measured else None
