"""The program in a process that is forked from one where the libraries are imported already.

Importing torch, transformers and peft takes five seconds, which every start of the program would pay. What runs is the
same: `main()` in a process of its own, with its own directory, environment, streams and exit code.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PRELOADED = [
    "tests.forked_imports",
    *(f"medicalgpt_cli.engine.training.{stage}" for stage in ("pretrain", "sft", "reward", "rl")),
    "medicalgpt_cli.engine.generation.infer",
    "medicalgpt_cli.engine.generation.conversation",
    "medicalgpt_cli.engine.model.merging",
    "medicalgpt_cli.engine.model.vocabulary",
    "medicalgpt_cli.engine.evaluation.score",
    "medicalgpt_cli.terminal.console",
]


def run(
    arguments: Sequence[str],
    env: dict[str, str],
    cwd: Path | None,
    said: str | None,
    timeout: float,
    signal_in: tuple[str, int] | None = None,
    umask: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` of `medgpt …` with captured text.

    Args:
        signal_in: "module:Class.method" and a signal, which the process gets as that is first called.

    Raises:
        TimeoutExpired: it took longer; it has been killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("in", "out", "err")]
        streams[0].write_text(said or "", encoding="utf-8")
        process = _context().Process(
            target=_main,
            args=(list(arguments), env, str(cwd or Path.cwd()), [*map(str, streams)], signal_in, umask),
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        out, err = (one.read_text(encoding="utf-8", errors="replace") for one in streams[1:])
    return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """The server is started with the environment that all runs share: libraries read it as they are imported."""
    from tests.cli import environment

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment())
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _main(
    arguments: list[str],
    env: dict[str, str],
    cwd: str,
    streams: list[str],
    signal_in: tuple[str, int] | None,
    umask: int | None,
) -> None:
    import random

    import numpy

    random.seed()  # what is not seeded by the program must not be the same in two runs
    numpy.random.seed()
    if umask is not None:
        os.umask(umask)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, (path, flags) in enumerate(
        zip(streams, (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT), strict=True)
    ):
        os.dup2(os.open(path, flags), number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8") for number, mode in enumerate(("r", "w", "w"))
    )
    sys.argv = ["medgpt", *arguments]
    from medicalgpt_cli.app import main

    if signal_in:
        _signal_in(*signal_in)
    try:
        main()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def _signal_in(where: str, number: int) -> None:
    """Have the process send itself a signal at the first call of "module:Class.method"."""
    module, _, name = where.partition(":")
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    original = getattr(owner, name)

    def signalled(*arguments: Any, **named: Any) -> Any:
        setattr(owner, name, original)
        os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(owner, name, signalled)
