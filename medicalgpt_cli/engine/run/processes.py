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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from medicalgpt_cli import working_folder
from medicalgpt_cli.engine.run import manifest, signals
from medicalgpt_cli.errors import EnvironmentFailure
from medicalgpt_cli.settings.stages import InferSettings, TrainSettings

LOST = 75  # exit code of a process that has lost another one of its run
_GRACE = 5.0  # seconds in which the others may end by themselves once one has failed
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_CHANNELS = "MEDGPT_CHANNELS"  # the open files of a process that lead to others


def size() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started() -> bool:
    """Whether a launcher, ours or torch's, has started this process as one of a run."""
    return "RANK" in os.environ


def launch_of(settings: TrainSettings | InferSettings) -> Launch | None:
    """The processes that a command still has to be started in; None where this one does it by itself.

    A training run goes on in as many as it had, where nothing else is said.

    Raises:
        UsageError: the file of `--accelerate-config` is not one, or none that medgpt takes.
    """
    if started() or getattr(settings, "dry_run", False):
        return None
    if isinstance(settings, InferSettings):
        count = settings.wanted_processes
        return Launch(count, count, connected=True) if count > 1 else None
    count, parallel, file = settings.wanted_processes, settings.parallel, settings.accelerate_config
    if settings.resume and (settings.resume / manifest.NAME).is_file():
        before = manifest.read(settings.resume)
        recorded = {name: entry["value"] for name, entry in before["settings"].items()}
        parallel = recorded.get("parallel", parallel)
        if not file and recorded.get("accelerate_config"):
            file = Path(recorded["accelerate_config"])
        if not settings.processes and not settings.gpus:
            count = before.get("processes", 1)
    if file:
        from medicalgpt_cli.engine.run.accelerate_file import read_launch

        return read_launch(file)
    return Launch(count, count) if count > 1 or parallel != "ddp" else None


def rank() -> int:
    """Which of them this is; the first one speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of this machine's processes this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


@dataclass(frozen=True)
class Launch:
    """The processes of a run that this machine starts: `here` of `total`, numbered from `first`."""

    here: int
    total: int
    first: int = 0
    address: str = "127.0.0.1"  # where the first process of all listens
    port: int | None = None  # a free one where there is no other machine
    environment: Mapping[str, str] = field(default_factory=dict)  # what they get beside this process' own
    connected: bool = False  # whether the first one has a connection to each other one (`channels`)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def supervise(arguments: Sequence[str], launch: Launch) -> int:
    """Run `medgpt …` in several processes and wait for all of them.

    Signals are passed on. Where one process fails, the others are ended.

    Returns:
        The exit code of the run.

    Raises:
        EnvironmentFailure: a process died without a word (killed, out of memory).
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(launch.here)]
        children = _start(arguments, launch, logs)
        with _passed_on(children):
            failed = _wait(children)
        if failed is None:
            return 0
        code = children[failed].returncode
        silent = launch.first + failed > 0
        said = logs[failed].read_text(encoding="utf-8", errors="replace") if silent else ""
    if code > 0 and code != LOST:
        sys.stderr.write(said)
        return code
    how = "lost the others" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    raise EnvironmentFailure(
        f"process {launch.first + failed + 1} of {launch.total} {how}; the run was stopped",
        "was memory short? what is saved goes on with --resume",
    )


def _start(arguments: Sequence[str], launch: Launch, logs: Sequence[Path]) -> list[subprocess.Popen]:
    shared = {
        **launch.environment,
        "WORLD_SIZE": str(launch.total),
        "LOCAL_WORLD_SIZE": str(launch.here),
        "MASTER_ADDR": launch.address,
        "MASTER_PORT": str(launch.port or free_port()),
    }
    threads = str(max((os.cpu_count() or 1) // len(logs), 1))
    pairs = [socket.socketpair() for _ in logs[1:] if launch.connected]
    ends = [[mine for mine, _ in pairs], *[[theirs] for _, theirs in pairs]] if pairs else [[] for _ in logs]
    children = []
    for number, log in enumerate(logs):
        rank = launch.first + number
        open_files = [end.fileno() for end in ends[number]]
        place = {"RANK": str(rank), "LOCAL_RANK": str(number), _CHANNELS: ",".join(map(str, open_files))}
        environment = {"OMP_NUM_THREADS": threads, **working_folder.environment(), **shared, **place}
        with log.open("w") as file:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": file} if rank else {}
            children.append(
                subprocess.Popen(
                    working_folder.python("-m", "medicalgpt_cli", *arguments),
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
    """On Linux a process of a run does not outlive the one that started it.

    Signals that are passed on to it wait until it listens.
    """
    signals.hold_back()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)


@contextlib.contextmanager
def _passed_on(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    def pass_on(number: int, _: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    with signals.handled(pass_on):
        yield


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
