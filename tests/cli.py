"""Running the real program in a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parents[1]


def medgpt(
    *arguments: object,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    input: str | None = None,
    timeout: float = 300,
    fresh: bool = False,
    signal_in: tuple[str, int] | None = None,
    umask: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `medgpt …` offline and give its exit code, stdout and stderr.

    `umask`: of a process that is not fresh.
    `fresh`: from the very start of the interpreter; else libraries are imported already (tests/forked.py).
    `signal_in`: "module:Class.method" and the signal that the process gets as that is first called.
    A variable that is not medgpt's own may be read by a library as it is imported, and needs a fresh one.
    """
    if fresh or any(not name.startswith("MEDGPT_") and name != "COLUMNS" for name in env or {}):
        return subprocess.run(
            command(*arguments),
            env=environment(env),
            cwd=cwd,
            input=input,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
    return forked.run(
        [str(one) for one in arguments], environment(env), cwd, input, timeout, signal_in, umask
    )


def start(*arguments: object, env: dict[str, str] | None = None, **options) -> subprocess.Popen[str]:
    """Start `medgpt …`, for tests that send it signals.

    A test run in the background ignores SIGINT, one under nohup SIGHUP, and so would what it starts.
    """
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen(
        command(*arguments),
        env=environment(env),
        text=True,
        preexec_fn=_heed_signals,
        **options,
    )


def _heed_signals() -> None:
    for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "medicalgpt_cli", *map(str, arguments)]


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MEDGPT_")}
    return {
        **clean,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",  # as training sets it by starting itself anew
        "COLUMNS": "100",
        **(more or {}),
    }
