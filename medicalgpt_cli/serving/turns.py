"""One turn on the page: the question to one model or to two, and their answers as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.serving import page_texts
from medicalgpt_cli.serving.answers import Answers, Asked, Listening
from medicalgpt_cli.settings.groups import SamplingSettings

_DRAWN_EVERY = 0.08  # seconds between two updates of the page


def plain(history: Sequence[Any] | None) -> list[Message]:
    """What gradio's chatbot holds as messages; only text of the two who speak, thoughts with the answer behind them."""
    found: list[Message] = []
    thoughts = ""
    for one in history or []:
        role, content = one.get("role"), one.get("content")
        if role not in ("user", "assistant"):
            continue
        if isinstance(content, list):
            content = "".join(
                part["text"]
                for part in content
                if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
        content = content if isinstance(content, str) else ""
        if is_thought(one):
            thoughts = content
            continue
        said: Message = {"role": role, "content": content}
        if role == "assistant" and thoughts:
            said["reasoning"] = thoughts
        found.append(said)
        thoughts = ""
    return found


def is_thought(shown: Any) -> bool:
    """Whether a message of the chatbot is a folded block of thoughts."""
    return isinstance(shown.get("metadata"), dict) and bool(shown["metadata"].get("title"))


def drawn(messages: Sequence[Message], *, running: bool = False) -> list[dict[str, Any]]:
    """Messages as the chatbot shows them: thoughts are a folded block of their own in front of their answer.

    Args:
        running: the last answer is still being written.
    """
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        if message.get("reasoning"):
            still = running and number == len(messages) and not message["content"]
            about = {"title": page_texts.THOUGHTS, "status": "pending" if still else "done"}
            found.append({"role": "assistant", "content": message["reasoning"], "metadata": about})
        if message["content"] or not message.get("reasoning"):
            found.append({"role": message["role"], "content": message["content"]})
    return found


def place_of(history: Sequence[Any], index: int) -> int:
    """Which message of the conversation the chatbot's message of this number is."""
    return sum(not is_thought(one) for one in history[:index])


def exact(history: Sequence[Any] | None, kept: str) -> list[Message]:
    """The conversation word for word. gradio trims what its chatbot shows; the text kept for download is as it was."""
    shown = plain(history)
    try:
        record = read_record(Row("the page", 1, json.loads(kept)), Counts())
    except (ValueError, RecursionError, DataError):
        return shown
    messages = [one for one in record.messages if one["role"] != "system"] if record else []
    return messages if len(messages) == len(shown) else shown


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    front: list[Message] = [{"role": "system", "content": system.strip()}] if (system or "").strip() else []
    return [*front, *messages]


def chosen_sampling(defaults: SamplingSettings, **chosen: Any) -> SamplingSettings:
    """The drawer's values; at temperature 0 the bounds of the draw mean nothing."""
    if chosen["temperature"] == 0:
        chosen |= {"top_p": 1.0, "top_k": 0}
    return dataclasses.replace(defaults, **chosen)


class Turn:
    """The answers to one question. `texts`, `thoughts` and `status` change while `progress` runs."""

    def __init__(self, answers: Answers, models: Sequence[str]):
        self.answers, self.models = answers, list(models)
        self.texts = [""] * len(self.models)
        self.thoughts = [""] * len(self.models)
        self.status = ""

    async def progress(
        self, messages: Sequence[Message], sampling: SamplingSettings, client: str, page: str, number: int
    ) -> AsyncIterator[None]:
        """Run until all answers are there; yields when there is something new. Close it to stop."""
        from medicalgpt_cli.engine.generation.scheduler import Busy

        heard: list[Listening] = []
        tasks: set[asyncio.Task] = set()
        began = time.monotonic()
        try:
            for model in self.models:
                heard.append(
                    await self.answers.ask(
                        Asked(messages),
                        sampling,
                        client=client,
                        page=page,
                        model=model,
                        fit=True,
                        number=number,
                    )
                )
            tasks = {asyncio.create_task(self._follow(place, one)) for place, one in enumerate(heard)}
            left = tasks
            while left:
                before = [*self.texts, *self.thoughts]
                _, left = await asyncio.wait(left, timeout=_DRAWN_EVERY)
                if [*self.texts, *self.thoughts] != before:
                    yield
            self.status = _told(heard, time.monotonic() - began)
        except Busy:
            self.status = page_texts.BUSY
        except UsageError as problem:
            self.status = problem.message
        except ValueError:
            self.status = "The question is too long. 问题过长。"
        finally:
            for task in tasks:
                task.cancel()
            for one in heard:
                one.close()
            self.answers.page_heard(page, heard)
        yield

    async def _follow(self, place: int, listening: Listening) -> None:
        async for deltas in listening.deltas():
            for delta in deltas or ():
                if delta.kind == "reasoning":
                    self.thoughts[place] += delta.text
                else:
                    self.texts[place] += delta.text

    def answer(self, place: int) -> list[Message]:
        """What was said so far, as a message; nothing where nothing was."""
        said: Message = {"role": "assistant", "content": self.texts[place]}
        if self.thoughts[place]:
            said["reasoning"] = self.thoughts[place]
        return [said] if said["content"] or "reasoning" in said else []


def _told(heard: Sequence[Listening], seconds: float) -> str:
    """A line about what it took."""
    failed = next((one.answer.error for one in heard if one.answer.error), None)
    if failed:
        return f"{failed[:1].upper()}{failed[1:]}."
    tokens = sum(one.answer.completion_tokens for one in heard)
    parts = [f"{tokens} tokens · {tokens / max(seconds, 1e-9):.1f} tokens/s"]
    if any(one.answer.finish_reason == "length" for one in heard):
        parts.append("cut at the limit 已达长度上限")
    if heard[0].dropped:
        parts.append(
            f"the context is full: the oldest {heard[0].dropped} messages were left out 已略去最早的消息"
        )
    return " · ".join(parts)
