"""Many askers, one model: requests join the running batch between tokens and leave it as they end.

One thread owns the model. Between two tokens it drops who went away, lets in who waits, and reads a piece of
each new prompt, so that a short question waits neither behind a long answer nor behind a long prompt. What is not
shared: each request has its own sampling, limit, random stream and deadline.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from medicalgpt_cli.engine.data.tools import Delta
from medicalgpt_cli.engine.generation.answer_reader import EncodedPrompt
from medicalgpt_cli.engine.generation.decoding import Answer, Batch, Row, Sampler, answer_of
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.settings.groups import SamplingSettings

# Tokens of new prompts that are read between two tokens of the running answers.
_PROMPT_TOKENS_A_STEP = 512
# How many requests' waiting times are kept for the metrics.
_KEPT_WAITS = 1000


@dataclass(frozen=True)
class Limits:
    batch: int = 16  # answers at once
    batch_tokens: int = 65536  # tokens of all rows of the batch with their padding: bounds the cache's memory
    queue: int = 64  # requests that wait
    client: int = 16  # requests of one client, waiting and running
    seconds: float = 300.0  # for a request, waiting included


class Busy(Exception):
    """There is no room for a request. `mine`: because this client has asked too much already."""

    def __init__(self, message: str, *, mine: bool = False):
        super().__init__(message)
        self.mine = mine


@dataclass(eq=False)
class Ticket:
    """A request. `deliver(deltas, answer)` is called in the worker's thread; `answer` comes with the last deltas."""

    row: Row
    variant: str
    client: str
    deliver: Callable[[list[Delta], Answer | None], None]
    asked: float
    deadline: float
    cancelled: bool = False
    started: bool = False  # whether its first token is there


@dataclass
class Counters:
    """What happened since the start. Numbers only."""

    requests: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    rows: int = 0  # summed over steps: rows / steps is the mean batch
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_WAITS))


class _Lane:
    """One variant's batches: new prompts, and the running batch (several where the model's cannot be joined)."""

    def __init__(self, context: Callable[[], Any]):
        self.context = context
        self.reading: list[Batch] = []
        self.running: list[Batch] = []

    @property
    def batches(self) -> list[Batch]:
        return [*self.running, *self.reading]


class Scheduler:
    """Answers prompts for many askers with one model.

    Args:
        variants: name to context manager under which the model speaks as that variant, for example with its
            adapter switched off. The first one is the default.
    """

    def __init__(
        self,
        backend: LocalBackend,
        limits: Limits,
        variants: Mapping[str, Callable[[], Any]] | None = None,
    ):
        self.backend, self.limits, self.counters = backend, limits, Counters()
        self._lanes = {name: _Lane(one) for name, one in (variants or {"": contextlib.nullcontext}).items()}
        self._waiting: deque[Ticket] = deque()
        self._tickets: dict[Row, Ticket] = {}  # of rows in batches
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    # -- for askers, from any thread ---------------------------------------------------------------------------

    def submit(
        self,
        prompt: EncodedPrompt | Sequence[int],
        sampling: SamplingSettings,
        deliver: Callable[[list[Delta], Answer | None], None],
        *,
        number: int = 0,
        variant: str | None = None,
        client: str = "",
    ) -> Ticket:
        """Ask for an answer.

        Args:
            number: what makes the draw its own beside the seed.
            client: who asks; the number of requests of one client is bounded.

        Raises:
            Busy: too many requests wait, or too many are this client's.
            ValueError: the prompt is empty or fills the context.
        """
        refused = self.backend.refusal(prompt)
        if refused:
            raise ValueError(refused)
        row = self.backend.row(prompt, Sampler(sampling), number)
        row.streams = True
        now = time.monotonic()
        name = next(iter(self._lanes)) if variant is None else variant
        ticket = Ticket(row, name, client, deliver, now, now + self.limits.seconds)
        with self._changed:
            try:
                self._must_have_room(client)
            except Busy:
                self.counters.refused += 1
                raise
            self.counters.requests += 1
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody listens any more; the row leaves before the next token."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Stop after the token that is being computed; unfinished requests end with an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> dict[str, int]:
        with self._changed:
            return {"waiting": len(self._waiting), "running": len(self._tickets)}

    def _must_have_room(self, client: str) -> None:
        if self._closing:
            raise Busy("the server is stopping")
        mine = sum(one.client == client for one in (*self._waiting, *self._tickets.values()))
        if mine >= self.limits.client:
            raise Busy(f"{mine} requests of this client are not answered yet", mine=True)
        if len(self._waiting) >= self.limits.queue:
            raise Busy(f"{len(self._waiting)} requests are waiting")

    # -- the worker --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._tickets):
                    self._changed.wait()
                if self._closing:
                    gone = [*self._waiting, *self._tickets.values()]
                    self._waiting.clear()
                    self._tickets.clear()
                    break
                over = self._take_out(time.monotonic())
                self._let_in()
            for ticket, answer in over:
                self._finish(ticket, answer)
            for lane in self._lanes.values():
                if lane.batches:
                    self._advance(lane)
        for ticket in gone:
            self._finish(ticket, self._failed(ticket, "the server is stopping"))

    def _take_out(self, now: float) -> list[tuple[Ticket, Answer]]:
        """Remove who went away or has no time left; gives those who are to be told."""
        over: list[tuple[Ticket, Answer]] = []
        for ticket in [one for one in self._waiting if one.cancelled or now > one.deadline]:
            self._waiting.remove(ticket)
            if ticket.cancelled:
                self.counters.cancelled += 1
            else:
                over.append((ticket, self._failed(ticket, "no answer within the time limit")))
        gone = [one for one in self._tickets.values() if one.cancelled or now > one.deadline]
        for ticket in gone:
            del self._tickets[ticket.row]
            if ticket.cancelled:
                self.counters.cancelled += 1
                self.counters.completion_tokens += len(ticket.row.said)
            else:
                over.append((ticket, answer_of(self.backend.tokenizer, ticket.row, "length")))
        if gone:
            rows = {ticket.row for ticket in gone}
            for lane in self._lanes.values():
                for batch in lane.batches:
                    batch.drop(rows)
                lane.reading = [one for one in lane.reading if one.rows]
                lane.running = [one for one in lane.running if one.rows]
        return over

    def _let_in(self) -> None:
        """Rows for those who wait longest, as far as the batch and its memory reach."""
        while self._waiting and len(self._tickets) < self.limits.batch:
            row = self._waiting[0].row
            widest = max(len(one.prompt) + one.limit for one in (row, *self._tickets))
            if self._tickets and (len(self._tickets) + 1) * widest > self.limits.batch_tokens:
                return
            ticket = self._waiting.popleft()
            self._tickets[row] = ticket
            self._lanes[ticket.variant].reading.append(self.backend.batch([row]))

    def _advance(self, lane: _Lane) -> None:
        """A piece of each new prompt, and one token of each running answer."""
        try:
            with lane.context():
                self._read(lane)
                for batch in list(lane.running):
                    self._step(lane, batch)
        except Exception as problem:  # between steps, where it cannot be said whose fault it was
            for batch in lane.batches:
                self._broken(lane, batch, problem)

    def _read(self, lane: _Lane) -> None:
        """Read new prompts in pieces; one that is read gets its first token and joins the running batch."""
        left = _PROMPT_TOKENS_A_STEP
        while lane.reading and left > 0:
            batch = lane.reading[0]
            try:
                read = batch.feed(left)
            except Exception as problem:
                self._broken(lane, batch, problem)
                continue
            left -= read or batch.fed.shape[1]
            if read:
                continue
            lane.reading.remove(batch)
            lane.running.append(batch)
            self._step(lane, batch)
            if batch in lane.running and len(lane.running) > 1 and batch.plain:
                lane.running[0].join(batch)
                lane.running.remove(batch)

    def _step(self, lane: _Lane, batch: Batch) -> None:
        self.counters.steps += 1
        self.counters.rows += len(batch.rows)
        try:
            found = batch.step()
        except Exception as problem:
            self._broken(lane, batch, problem)
            return
        outdated = batch.take_outdated()
        if outdated:
            lane.reading.append(self.backend.batch(outdated))
        if not batch.rows:
            lane.running.remove(batch)
        now = time.monotonic()
        for row, reason in found:
            ticket = self._tickets[row]
            if not ticket.started:
                ticket.started = True
                self.counters.first_token_seconds.append(now - ticket.asked)
            if reason:
                with self._changed:
                    del self._tickets[row]
                self._finish(ticket, answer_of(self.backend.tokenizer, row, reason))
            else:
                self._deliver(ticket, row.reader(self.backend.tokenizer).take(), None)

    def _broken(self, lane: _Lane, batch: Batch, problem: Exception) -> None:
        """A step failed (memory, a broken device): its requests fail, the server goes on."""
        for batches in (lane.reading, lane.running):
            if batch in batches:
                batches.remove(batch)
        word = "out of memory" if "memory" in str(problem).lower() else type(problem).__name__
        for row in batch.rows:
            with self._changed:
                ticket = self._tickets.pop(row, None)
            if ticket is not None:
                self._finish(ticket, self._failed(ticket, f"the model failed ({word})"))

    def _failed(self, ticket: Ticket, why: str) -> Answer:
        return Answer("", [], "error", len(ticket.row.prompt), len(ticket.row.said), why)

    def _finish(self, ticket: Ticket, answer: Answer) -> None:
        if answer.error is None:
            self.counters.finished += 1
        else:
            self.counters.failed += 1
        self.counters.prompt_tokens += answer.prompt_tokens
        self.counters.completion_tokens += answer.completion_tokens
        left = [] if answer.error else ticket.row.reader(self.backend.tokenizer).take()
        self._deliver(ticket, left, answer)

    def _deliver(self, ticket: Ticket, deltas: list[Delta], answer: Answer | None) -> None:
        """Whoever asked may be gone; that must not stop the others."""
        with contextlib.suppress(Exception):
            ticket.deliver(deltas, answer)
