"""From the server's event loop to the scheduler's thread, and back as a stream of pieces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.settings.fields import options_of
from medicalgpt_cli.settings.groups import SamplingSettings

if TYPE_CHECKING:
    from medicalgpt_cli.engine.data.reasoning import Thinking
    from medicalgpt_cli.engine.data.tools import Delta
    from medicalgpt_cli.engine.generation.decoding import Answer
    from medicalgpt_cli.engine.generation.scheduler import Scheduler


_SHORT = 8192  # characters of a prompt that is read at once
_LONG_READERS = 2  # threads for those that are longer


@dataclass(frozen=True)
class Asked:
    """What is to be answered: a conversation, or raw text to continue.

    tools: that may be called. thinking: whether reasoning is asked for; the server's settings where None.
    """

    messages: Sequence[Message] | str
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: Thinking | None = None

    @property
    def length(self) -> int:
        """Characters, about."""
        if isinstance(self.messages, str):
            return len(self.messages)
        calls = [one["tool_calls"] for one in self.messages if "tool_calls" in one]
        texts = sum(len(one["content"]) + len(one.get("reasoning", "")) for one in self.messages)
        return texts + len(json.dumps([calls, self.tools]))


class Listening:
    """An answer while it comes. Close it, and its place in the batch is free."""

    def __init__(self, scheduler: Any):
        self._scheduler, self._loop = scheduler, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[list[Delta], Answer | None]] = asyncio.Queue()
        self.ticket: Any = None
        self.dropped = 0  # messages left out of the prompt because the context was full
        self.answer: Answer | None = None

    def deliver(self, deltas: list[Delta], answer: Answer | None) -> None:
        """Called in the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, (deltas, answer))

    async def deltas(self, silence: float | None = None) -> AsyncIterator[list[Delta] | None]:
        """Reasoning, text and calls as they come, and None after each `silence` seconds without any.

        What came together is given together, so that a slow reader has fewer pieces and not more memory.
        """
        from medicalgpt_cli.engine.generation.answer_reader import joined

        try:
            while self.answer is None:
                try:
                    found, self.answer = await asyncio.wait_for(self._events.get(), silence)
                except TimeoutError:
                    yield None
                    continue
                while self.answer is None and not self._events.empty():
                    more, self.answer = self._events.get_nowait()
                    found = [*found, *more]
                if found:
                    yield joined(found)
        finally:
            self.close()

    async def whole(self) -> Answer:
        async for _ in self.deltas():
            pass
        return self.answer

    def close(self) -> None:
        if self.answer is None:
            self._scheduler.cancel(self.ticket)


class Readers:
    """Threads that make prompts: one for short ones, which never wait for a long one, and some for long ones."""

    def __init__(self, backend: Any):
        self._short, self._backend = ThreadPoolExecutor(1, "tokenizer"), backend
        self._long = ThreadPoolExecutor(_LONG_READERS, "tokenizer-long")
        self._of_long: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(_LONG_READERS):
            self._of_long.put(backend.for_another_thread())

    async def read(self, asked: Asked, make: Callable[[Any], Any]) -> Any:
        """What `make` returns for a backend whose tokenizer no other thread uses meanwhile."""
        loop = asyncio.get_running_loop()
        if asked.length <= _SHORT:
            return await loop.run_in_executor(self._short, make, self._backend)
        return await loop.run_in_executor(self._long, self._read_long, make)

    def _read_long(self, make: Callable[[Any], Any]) -> Any:
        backend = self._of_long.get()
        try:
            return make(backend)
        finally:
            self._of_long.put(backend)

    def close(self) -> None:
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)


class Answers:
    """The model for everybody in this process: one scheduler, and threads that read prompts.

    Args:
        reader: the backend that makes prompts; its tokenizer is not the scheduler's.
        models: the names under which the model answers, and the variant that each is. The first is the default.
    """

    def __init__(self, scheduler: Scheduler, reader: Any, settings: SamplingSettings, models: dict[str, str]):
        self.scheduler, self.reader, self.models = scheduler, reader, models
        self.sampling = SamplingSettings(
            **{name: getattr(settings, name) for name in options_of(SamplingSettings)}
        )
        self._of_pages: dict[str, set[Listening]] = {}
        self._readers = Readers(reader)
        self._reading: Counter[str] = Counter()  # prompts of each client that are being read

    @property
    def default_model(self) -> str:
        return next(iter(self.models))

    async def ask(
        self,
        asked: Asked,
        sampling: SamplingSettings,
        *,
        client: str,
        model: str | None = None,
        fit: bool = False,
        number: int = 0,
        page: str | None = None,
    ) -> Listening:
        """Put a conversation, or raw text to continue, into the queue.

        Args:
            fit: leave the oldest exchanges out where they do not fit the context, instead of refusing.
            number: what makes the draw its own beside the seed.
            page: the page that asks; when it is closed, `page_closed` frees the place.

        Raises:
            Busy: there is no room.
            ValueError: the prompt fills the context.
            UsageError: the chat template refuses the conversation.
        """
        listening = Listening(self.scheduler)
        self._must_have_room(client)
        self._reading[client] += 1
        try:
            if fit:
                prompt, listening.dropped = await self._readers.read(
                    asked,
                    lambda reader: reader.fitted_prompt(
                        asked.messages, sampling.max_new_tokens, asked.tools, asked.thinking
                    ),
                )
            else:
                prompt = await self._readers.read(
                    asked, lambda reader: reader.bounded_prompt(asked.messages, asked.tools, asked.thinking)
                )
        finally:
            self._reading[client] -= 1
            if not self._reading[client]:
                del self._reading[client]
        listening.ticket = self.scheduler.submit(
            prompt,
            sampling,
            listening.deliver,
            number=number,
            variant=self.models[model or self.default_model],
            client=client,
        )
        if page:
            self._of_pages.setdefault(page, set()).add(listening)
        return listening

    def _must_have_room(self, client: str) -> None:
        """What waits to be read is bounded as what waits to be answered: reading takes time, too."""
        from medicalgpt_cli.engine.generation.scheduler import Busy

        limits, mine = self.scheduler.limits, self._reading[client]
        if mine >= limits.client:
            raise Busy(f"{mine} requests of this client are not read yet", mine=True)
        if self._reading.total() >= limits.queue + limits.batch:
            raise Busy(f"{self._reading.total()} requests are waiting")

    def page_closed(self, page: str) -> None:
        """Nobody listens to the answers of this page any more."""
        for listening in self._of_pages.pop(page, ()):
            listening.close()

    def page_heard(self, page: str, heard: Sequence[Listening]) -> None:
        """These answers of a page are over."""
        left = self._of_pages.get(page, set())
        left.difference_update(heard)
        if not left:
            self._of_pages.pop(page, None)

    def close(self) -> None:
        self.scheduler.close()
        self._readers.close()
