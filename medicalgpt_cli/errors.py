"""Every failure a user can meet: one line of what is wrong, one hint, one exit code.

Exit codes (docs/operations.md): 0 done, 1 unexpected, 2 wrong usage, settings or data, 3 environment,
4 refused as unsafe, 5 training went wrong, 130 and 143 stopped by a signal with the work saved.
"""

from __future__ import annotations

import signal


class MedgptError(Exception):
    """A failure with a message for the user. `hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MedgptError):
    """Wrong flags, settings or combinations of them; an existing output; a changed resume."""

    exit_code = 2


class DataError(MedgptError):
    """A file that cannot be used as data. Build it with `at=` so that the message starts with file:line."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None, *, at: str | None = None):
        super().__init__(f"{at}: {message}" if at else message, hint)


class EnvironmentFailure(MedgptError):
    """Memory, disk, device, port, endpoint or network."""

    exit_code = 3


class UnsafeRefused(MedgptError):
    """Something that medgpt will not do because it would be unsafe (pickle, remote code, open host)."""

    exit_code = 4


class TrainingFailed(MedgptError):
    """Training went wrong (NaN, divergence). The last good checkpoint is kept and named in the hint."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """A signal that asks to stop came. As Ctrl-C does, it passes every `except Exception` on its way."""

    def __init__(self, number: int):
        super().__init__()
        self.signal_name = signal.Signals(number).name
        self.exit_code = 130 if number == signal.SIGINT else 143


class Stopped(MedgptError):
    """A signal asked to stop; what could be saved was saved. `exit_code` is 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = 130):
        super().__init__(message, hint)
        self.exit_code = exit_code
