"""What medgpt says: results on stdout, everything else on stderr. Plain lines where it is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import MedgptError

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_EVERY = 15.0  # seconds between two lines of the same task where there is no bar
_WORTH_A_LINE = 1.0  # a task shorter than this leaves no line behind


def results() -> Console:
    """The console for what was asked for (stdout)."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def messages() -> Console:
    """The console for everything else (stderr)."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def one_line(text: str) -> str:
    """Text without line breaks and without control characters, which could drive the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip()


def say(console: Console, label: str, text: str, style: str) -> None:
    """One line `label: text`. A terminal gets colour and breaks between words; a file gets one whole line."""
    from rich.text import Text

    line = Text.assemble((f"{label}:", style), " ", one_line(text))
    console.print(line, soft_wrap=not console.is_terminal)


def print_error(error: MedgptError) -> None:
    """An `error:` line and, where there is one, a `hint:` line on stderr."""
    console = messages()
    say(console, "error", error.message, "bold red")
    if error.hint:
        say(console, "hint", error.hint, "cyan")


class TerminalObserver(Observer):
    """Draws the engine's events: bars and the training panel on a terminal, one line each elsewhere.

    Use as a context manager: leaving it takes the drawing off the screen, also on an error.
    `quiet` (with --json) says nothing at all; errors are the app's.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None):
        self._quiet = quiet
        self._given = console
        self._screen: Any = None
        self._tasks: dict[str, _Task] = {}
        self._training: Any = None

    def __enter__(self) -> TerminalObserver:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave_panel()  # a training that was stopped or failed leaves its last state on the screen
        self._leave_screen()

    # -- words ---------------------------------------------------------------------------------------------

    def on_notice(self, text: str) -> None:
        self._say("note", text, "cyan")

    def on_warning(self, text: str) -> None:
        self._say("warning", text, "yellow")

    # -- bounded work --------------------------------------------------------------------------------------

    def on_task_start(self, task: str, total: int | None = None, unit: str = "") -> None:
        if self._quiet:
            return
        self._tasks[task] = _Task(total, unit)
        if self._drawing:
            self._draw().start_task(task, total, unit)

    def on_task_advance(self, task: str, done: int) -> None:
        state = self._tasks.get(task)
        if state is None:
            return
        state.done = done
        if self._drawing:
            self._draw().advance_task(task, done)
        elif time.monotonic() - state.said > _PLAIN_EVERY:
            state.said = time.monotonic()
            self._line(f"{task}: {state.progress}")

    def on_task_end(self, task: str) -> None:
        state = self._tasks.pop(task, None)
        if state is None:
            return
        if self._drawing:
            self._draw().end_task(task)
            if not self._tasks and self._training is None:
                self._leave_screen()  # what comes next may be a prompt, which a live drawing would paint over
        seconds = time.monotonic() - state.started
        if seconds >= _WORTH_A_LINE and self._training is None:
            self._line(f"{task}: {state.outcome}{seconds:.1f} s", "dim")

    # -- training ------------------------------------------------------------------------------------------

    def on_data(self, report: Mapping[str, Any]) -> None:
        from medicalgpt_cli.terminal.progress import data_lines

        for line in data_lines(report):
            self._line(line)

    def on_train_start(self, plan: Mapping[str, Any]) -> None:
        if self._quiet:
            return
        from medicalgpt_cli.terminal.progress import TrainingState, start_lines

        self._training = TrainingState(plan)
        for line in start_lines(plan):
            self._line(line)
        if self._drawing:
            self._draw().training = self._training

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._training is None:
            return
        self._training.add_metrics(step, metrics)
        self._plain_only(self._training.metrics_line)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._training is None:
            return
        self._training.add_eval(step, metrics)
        self._plain_only(self._training.eval_line)

    def on_checkpoint(self, step: int, path: str) -> None:
        if self._training is None:
            return
        self._training.checkpoint = step
        self._plain_only(lambda: f"step {step}  checkpoint saved")

    def on_train_end(self, result: Mapping[str, Any]) -> None:
        if self._training is None:
            return
        from medicalgpt_cli.terminal.progress import end_lines

        self._leave_panel()
        for line in end_lines(result):
            self._line(line)

    def _leave_panel(self) -> None:
        """Put the panel, until now redrawn in place, among the lines that stay."""
        if self._training is not None and self._drawing:
            from medicalgpt_cli.terminal.progress import panel

            self._draw().training = None
            self._console.print(panel(self._training, self._console.width - 3, running=False))
        self._training = None

    # -- drawing -------------------------------------------------------------------------------------------

    def _leave_screen(self) -> None:
        if self._screen is not None:
            self._screen.close()
            self._screen = None

    @property
    def _console(self) -> Console:
        if self._given is None:
            self._given = messages()
        return self._given

    @property
    def _drawing(self) -> bool:
        return not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal

    def _draw(self) -> Any:
        if self._screen is None:
            from medicalgpt_cli.terminal.progress import Screen

            self._screen = Screen(self._console)
        return self._screen

    def _say(self, label: str, text: str, style: str) -> None:
        if not self._quiet:
            say(self._console, label, text, style)

    def _line(self, text: str, style: str = "") -> None:
        if not self._quiet:
            from rich.text import Text

            self._console.print(Text(one_line(text), style=style), soft_wrap=not self._console.is_terminal)

    def _plain_only(self, line: Any) -> None:
        if not self._drawing:
            self._line(line())


class _Task:
    """How far a bounded piece of work is."""

    def __init__(self, total: int | None, unit: str):
        self.total, self.unit, self.done = total, unit, 0
        self.started = self.said = time.monotonic()

    @property
    def progress(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.done:,} of {self.total:,}{unit}" if self.total else f"{self.done:,}{unit}"

    @property
    def outcome(self) -> str:
        return f"{self.done:,} {self.unit} in " if self.unit and self.done else ""
