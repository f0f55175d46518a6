"""Questions that several processes answer: the first one reads, writes and speaks, the others only answer.

A helper asks for a batch whenever it has none, so that all processes end at about the same time however long the
answers are. What is said goes through `processes.channels`, as JSON: nothing is written anywhere on the way.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from medicalgpt_cli.engine.generation.answer_reader import EncodedPrompt
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.errors import Stopped

_DRAIN = 3.0  # seconds in which helpers that were stopped, too, hand in what they have answered


def even_batch_size(questions: int, batch_size: int, count: int) -> int:
    """At most `batch_size`, so that each of `count` processes finds as many batches in a small file."""
    if count == 1:
        return batch_size
    rounds = math.ceil(questions / (batch_size * count))
    return math.ceil(questions / (rounds * count)) if questions else batch_size


def help_out(backend: LocalBackend) -> None:
    """Answer what the first process hands out, until there is nothing left."""
    (first,) = processes.channels()

    def tell(said: dict[str, Any] | None) -> None:
        first.send_bytes(json.dumps(said).encode())

    def done(numbers: Sequence[int], place: int, answer: Answer) -> None:
        fields = {**asdict(answer), "token_ids": []}  # a row of the predictions file has none
        tell({"number": numbers[place], "answer": fields})

    try:
        tell(None)
        while (work := json.loads(first.recv_bytes())) is not None:
            numbers = work["numbers"]
            backend.answer_batch(
                [EncodedPrompt(**one) for one in work["prompts"]],
                lambda place, answer, numbers=numbers: done(numbers, place, answer),
                numbers=numbers,
            )
            tell(None)
    except (EOFError, ConnectionError):
        raise SystemExit(processes.LOST) from None  # who started this process says what ended the first one


class Helpers:
    """The helpers as the first process sees them: a thread of it hands out batches and takes in answers."""

    def __init__(
        self,
        channels: Sequence[Connection],
        take: Callable[[], tuple[list[int], list[EncodedPrompt]] | None],
        keep: Callable[[int, Answer], None],
        sync: Callable[[], None],
    ):
        """
        Args:
            take: numbers and prompts of the next batch, None where there is none; called from several threads.
            keep: takes an answer in. sync: called after each batch.
        """
        self._open, self._take, self._keep, self._sync = list(channels), take, keep, sync
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Helpers:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            self._thread.join(_DRAIN)

    def check(self) -> None:
        """
        Raises:
            SystemExit: a helper is gone. Who started the processes says why.
            OSError: what a helper answered could not be written.
        """
        if self._problem is not None:
            raise self._problem

    def finish(self) -> None:
        """Wait for the last answers."""
        while self._thread.is_alive():
            self._thread.join(0.2)  # signals come in between
            self.check()
        self.check()

    def _serve(self) -> None:
        try:
            while self._open:
                for channel in wait(self._open):
                    self._listen(channel)
        except Exception as problem:  # the disk is full, say: the first thread has to know
            self._problem = problem

    def _listen(self, channel: Connection) -> None:
        try:
            said = json.loads(channel.recv_bytes())
        except (EOFError, OSError):  # also in the middle of a message
            self._open.remove(channel)
            self._problem = SystemExit(processes.LOST)
            return
        if said is not None:
            fields = {**said["answer"], "tool_calls": tuple(said["answer"]["tool_calls"])}
            self._keep(said["number"], Answer(**fields))
            return
        self._sync()
        work = self._take()
        if work is None:
            self._open.remove(channel)
        with contextlib.suppress(ConnectionError):  # gone meanwhile: the next message says so
            batch = work and {"numbers": work[0], "prompts": [asdict(one) for one in work[1]]}
            channel.send_bytes(json.dumps(batch).encode())
