"""Signals that ask to stop: from the first moment of the program they end it with a word and the right exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from medicalgpt_cli.errors import Interrupted

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_received: list[int] = []


def listen() -> None:
    """End the program by an exception at each of these signals, so that files are closed and locks are freed.

    Training replaces these handlers by ones that save a checkpoint first. Signals that came while this process was
    started by another one of ours come now (`held_back`).
    """
    _received.clear()
    _handle(interrupt)
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def interrupt(number: int, _: FrameType | None = None) -> None:
    """Note the signal and raise `Interrupted`. Code that swallows the exception does not make it unsaid."""
    _received.append(number)
    raise Interrupted(number)


def received() -> int | None:
    """The signal that came last, whether or not its exception was swallowed on its way; None without one."""
    return _received[-1] if _received else None


def ignore() -> None:
    """The work is done and its exit code is settled: while the interpreter shuts down, a signal would only hide it."""
    _handle(signal.SIG_IGN)


def forget() -> None:
    """The signal was taken as something else than the end of the program."""
    _received.clear()


def hold_back() -> None:
    """Keep the signals until the program that this process becomes has called `listen`: until then they would
    kill it without a word. What is started in this state inherits it."""
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Another handler for a while."""
    before = _handle(handler)
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def _handle(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> dict[int, Any]:
    """Set a handler for each signal that is not ignored (`nohup` ignores SIGHUP, a shell's background SIGINT)."""
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def end(problem: BaseException) -> None:
    """End the program before there is anything to close: a line, and the exit code."""
    name, code = getattr(problem, "signal_name", "SIGINT"), getattr(problem, "exit_code", 130)
    sys.stderr.write(f"error: stopped by {name}\n")
    sys.exit(code)
