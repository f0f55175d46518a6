"""Work on somebody's file in a child process that may use only so much memory and time.

For what a library builds from a file without a bound of its own: a template, a pattern, a packed table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.run import limited
from medicalgpt_cli.engine.run.environment import cache_folder

_WAIT = 60  # seconds on the clock beside those of the processor: the machine may be busy


class OutOfBounds(Exception):
    """The child was stopped; the text says at which bound."""


def start(
    script: Path, arguments: Sequence[str], *, memory: int, seconds: int = 0
) -> subprocess.Popen[bytes]:
    """Start a script of this package; its standard streams are pipes, but for what it has to complain about.

    Args:
        memory: bytes of address space. seconds: of processor time; 0 is without bound.
    """
    command = [sys.executable, "-P", limited.__file__, str(memory), str(seconds), str(script), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def ask(script: Path, question: Any, *, memory: int, seconds: int) -> Any:
    """What a script answers, both as JSON through its standard streams.

    Raises:
        OutOfBounds: it needed more than it may use.
    """
    child = start(script, [], memory=memory, seconds=seconds)
    try:
        said, _ = child.communicate(json.dumps(question).encode(), timeout=seconds + _WAIT)
    except subprocess.TimeoutExpired:
        raise OutOfBounds(f"{seconds} s") from None
    finally:
        child.kill()
        child.wait()
    if child.returncode != 0:
        raise OutOfBounds(why_ended(child.returncode, memory=memory, seconds=seconds))
    return json.loads(said)


def passed_before(script: Path, question: Any) -> bool:
    """Whether this very script found nothing wrong with it before: the answer is kept as a file's name."""
    return _mark(script, question).is_file()


def remember(script: Path, question: Any) -> None:
    """Keep that nothing was wrong. Without a cache folder nothing is kept: a dry run does not make one."""
    mark = _mark(script, question)
    with contextlib.suppress(OSError):  # it is only asked again
        mark.parent.mkdir(exist_ok=True, mode=0o700)
        mark.touch()


def _mark(script: Path, question: Any) -> Path:
    asked = script.read_bytes() + json.dumps(question, sort_keys=True).encode()
    return cache_folder() / "checked" / hashlib.sha256(asked).hexdigest()


def why_ended(code: int, *, memory: int, seconds: int = 0) -> str:
    """The bound at which a child ended, from its exit code."""
    out_of_time = code in (-getattr(signal, "SIGXCPU", 0), -getattr(signal, "SIGKILL", 0)) and seconds
    return f"{seconds} s" if out_of_time else f"{memory // 2**20:,} MiB of memory"
