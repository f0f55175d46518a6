"""One run in several processes: starting them, stopping them together, and one word where one of them dies.

A process of a run is a whole `medgpt` with the variables that torch's launchers set (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT), so that `torchrun -m medicalgpt_cli sft …` works as well, over several machines, too.
Processes that train talk through torch.distributed; those that only answer questions through `channels`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from medicalgpt_cli.errors import EnvironmentFailure

LOST = 75  # exit code of a process that has lost another one of its run
_GRACE = 5.0  # seconds in which the others may end by themselves once one has failed
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_CHANNELS = "MEDGPT_CHANNELS"  # the open files of a process that lead to others


def size() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; the first one speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of this machine's processes this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@functools.cache
def channels() -> list[Connection]:
    """The first process' connections to the others, in their order; another one's only connection, to the first."""
    return [Connection(int(number)) for number in os.environ.get(_CHANNELS, "").split(",") if number]


def lost_partner(error: Exception) -> bool:
    """Whether an error only says that another process of the run is gone."""
    if size() == 1 or not isinstance(error, RuntimeError):
        return False
    frame, files = error.__traceback__, []
    while frame is not None:
        files.append(frame.tb_frame.f_code.co_filename)
        frame = frame.tb_next
    word = str(error).lower()
    return any("distributed" in Path(file).parts for file in files[-3:]) or "gloo" in word or "nccl" in word


def supervise(arguments: Sequence[str], count: int, *, connected: bool = False) -> int:
    """Run `medgpt …` in `count` processes and wait for all of them.

    Signals are passed on. Where one process fails, the others are ended.

    Args:
        connected: give the first process a connection to each other one (`channels`).

    Returns:
        The exit code of the run.

    Raises:
        EnvironmentFailure: a process died without a word (killed, out of memory).
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(count)]
        children = _start(arguments, logs, connected)
        with _passed_on(children):
            failed = _wait(children)
        if failed is None:
            return 0
        code = children[failed].returncode
        said = logs[failed].read_text(encoding="utf-8", errors="replace") if failed else ""
    if code > 0 and code != LOST:
        sys.stderr.write(said)
        return code
    how = "lost the others" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    raise EnvironmentFailure(
        f"process {failed + 1} of {count} {how}; the run was stopped",
        "was memory short? what is saved goes on with --resume",
    )


def _start(arguments: Sequence[str], logs: Sequence[Path], connected: bool) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(len(logs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = str(max((os.cpu_count() or 1) // len(logs), 1))
    pairs = [socket.socketpair() for _ in logs[1:] if connected]
    ends = (
        [[mine for mine, _ in pairs], *[[theirs] for _, theirs in pairs]] if connected else [[] for _ in logs]
    )
    children = []
    for number, log in enumerate(logs):
        open_files = [end.fileno() for end in ends[number]]
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(len(logs))}
        place[_CHANNELS] = ",".join(map(str, open_files))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared, **place}
        with log.open("w") as file:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": file} if number else {}
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "medicalgpt_cli", *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # the terminal's Ctrl-C comes to us, and we pass it on once
                    preexec_fn=_end_with_parent,
                    pass_fds=open_files,
                    **quiet,
                )
            )
    for end in itertools.chain.from_iterable(pairs):
        end.close()  # a process sees the end of another one only where nobody else holds the connection
    return children


def _end_with_parent() -> None:
    """On Linux a process of a run does not outlive the one that started it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)


@contextlib.contextmanager
def _passed_on(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    def pass_on(number: int, _: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {
        number: signal.signal(number, pass_on)
        for name in _FORWARDED
        if (number := getattr(signal, name, None))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen]) -> int | None:
    """Wait for the end of all. Gives which one failed: one that was killed before one that lost its partner."""
    failed_at = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.poll() for child in children):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE:
            left = [child for child in children if child.poll() is None]
            failed = _first_failed([child for child in children if child not in left])
            for child in left:
                child.kill()
                child.wait()
            return children.index(failed) if failed else None
        time.sleep(0.05)
    failed = _first_failed(children)
    return children.index(failed) if failed else None


def _first_failed(children: Sequence[subprocess.Popen]) -> subprocess.Popen | None:
    failed = [child for child in children if child.returncode]
    return min(failed, key=lambda child: (child.returncode == LOST, child.returncode)) if failed else None
