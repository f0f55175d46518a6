"""The scheduler's face over another server: that server batches, here requests are only bounded and counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from medicalgpt_cli.engine.data.tools import Delta
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.endpoint import EndpointBackend, Events, RemotePrompt
from medicalgpt_cli.engine.generation.endpoint_replies import put_together
from medicalgpt_cli.engine.generation.scheduler import Busy, Counters, Limits
from medicalgpt_cli.errors import MedgptError
from medicalgpt_cli.settings.groups import SamplingSettings


@dataclass(eq=False)
class RemoteTicket:
    client: str
    deliver: Callable[[list[Delta], Answer | None], None]
    asked: float
    deadline: float
    cancelled: bool = False
    running: bool = False


class EndpointScheduler:
    """Passes requests on, `limits.batch` at a time."""

    alive = True

    def __init__(self, backend: EndpointBackend, limits: Limits):
        self.backend, self.limits, self.counters = backend, limits, Counters()
        self._tickets: set[RemoteTicket] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(limits.batch, "endpoint")

    @property
    def load(self) -> dict[str, int]:
        with self._lock:
            running = sum(one.running for one in self._tickets)
            return {"waiting": len(self._tickets) - running, "running": running}

    def submit(
        self,
        prompt: RemotePrompt,
        sampling: SamplingSettings,
        deliver: Callable[[list[Delta], Answer | None], None],
        *,
        number: int = 0,
        variant: str | None = None,
        client: str = "",
    ) -> RemoteTicket:
        """Ask for an answer; see `Scheduler.submit`."""
        refused = self.backend.refusal(prompt)
        if refused:
            raise ValueError(refused)
        self.backend.body(prompt, sampling, number)  # says now what cannot be passed on
        now = time.monotonic()
        ticket = RemoteTicket(client, deliver, now, now + self.limits.seconds)
        with self._lock:
            mine = sum(one.client == client for one in self._tickets)
            waiting = len(self._tickets) - sum(one.running for one in self._tickets)
            if mine >= self.limits.client or waiting >= self.limits.queue + self.limits.batch:
                self.counters.refused += 1
                raise Busy(f"{len(self._tickets)} requests are waiting", mine=mine >= self.limits.client)
            self.counters.requests += 1
            self._tickets.add(ticket)
        self._pool.submit(self._answer, ticket, prompt, sampling, number)
        return ticket

    def cancel(self, ticket: RemoteTicket) -> None:
        ticket.cancelled = True

    def close(self) -> None:
        for ticket in list(self._tickets):
            ticket.cancelled = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.backend.close()

    def _answer(
        self, ticket: RemoteTicket, prompt: RemotePrompt, sampling: SamplingSettings, number: int
    ) -> None:
        ticket.running = True
        answer: Answer | None = None
        said: list[Delta] = []
        try:
            if time.monotonic() > ticket.deadline:
                answer = Answer("", [], "error", 0, 0, "no answer within the time limit")
            elif not ticket.cancelled:
                answer = self._listen(ticket, self.backend.events(prompt, sampling, number), said)
        except MedgptError as problem:
            answer = Answer("", [], "error", 0, 0, problem.message)
        except Exception as problem:  # a closed connection while the server stops
            answer = Answer(
                "", [], "error", 0, 0, f"the server behind this one failed ({type(problem).__name__})"
            )
        with self._lock:
            self._tickets.discard(ticket)
            self._count(answer)
        if answer is not None:
            ticket.deliver([], answer)

    def _listen(self, ticket: RemoteTicket, events: Events, said: list[Delta]) -> Answer | None:
        try:
            for deltas, answer in events:
                if ticket.cancelled:
                    return None
                if deltas and not said:
                    self.counters.first_token_seconds.append(time.monotonic() - ticket.asked)
                said += deltas
                ticket.deliver(deltas, None)
                if answer is not None:
                    return answer
                if time.monotonic() > ticket.deadline:
                    return put_together(said, "length", {}, len(said))
        finally:
            events.close()
        return None

    def _count(self, answer: Answer | None) -> None:
        if answer is None:
            self.counters.cancelled += 1
        elif answer.error is not None:
            self.counters.failed += 1
        else:
            self.counters.finished += 1
            self.counters.prompt_tokens += answer.prompt_tokens
            self.counters.completion_tokens += answer.completion_tokens
