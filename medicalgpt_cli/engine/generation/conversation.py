"""One conversation with a model: history, what fits the context, one answer at a time.

An answer may be calls of tools, where a conversation that was taken up has some: `give_result` says what they gave.
What was thought in front of an answer is kept with it, and the template decides what an earlier answer shows of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.messages import Message, ToolCall
from medicalgpt_cli.engine.data.normalised import line_of, normalised
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import Record, read_record
from medicalgpt_cli.engine.data.rendering import check_template
from medicalgpt_cli.engine.data.tool_messages import with_ids
from medicalgpt_cli.engine.data.tools import Delta
from medicalgpt_cli.engine.generation.answer_reader import content_of
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.endpoint import EndpointBackend
from medicalgpt_cli.engine.generation.infer import uses_template
from medicalgpt_cli.engine.generation.local import LocalBackend, load_to_answer
from medicalgpt_cli.engine.generation.wire import with_call_ids
from medicalgpt_cli.engine.model.loading import load_tokenizer
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import ChatSettings, InferSettings

Deltas = Generator[list[Delta], None, None]


class Conversation:
    """What was said, and the model that answers."""

    def __init__(self, backend: LocalBackend | EndpointBackend, label: str, system: str | None):
        self.backend, self.label, self.system = backend, label, system
        self.turns: list[Message] = []
        self.tools: tuple[dict[str, Any], ...] = ()  # that may be called: those of the conversation taken up
        self.asked: str | None = None  # the last question, also where it got no answer
        self.thoughts = ""  # in front of the last answer
        self.draws = 0  # answers to it that were drawn so far
        self.dropped = 0  # messages left out of the last prompt because the context was full
        self.seconds = 0.0  # that the last answer took
        self.raw = False  # whether `answer_alone` continues raw text instead of using the template

    @classmethod
    def open(cls, settings: ChatSettings | InferSettings, observer: Observer) -> Conversation:
        """Load the model of the settings, or find the server that has one."""
        single = isinstance(settings, InferSettings)
        if settings.endpoint:
            backend = EndpointBackend.open(settings, observer)
            opened = cls(backend, backend.model, settings.system_prompt)
            opened.raw = single and settings.with_prompt is False
            return opened
        resolved = resolve_models(settings)
        plain = settings.with_prompt is True if single else True
        tokenizer = load_tokenizer(settings, resolved, observer, plain_template=plain)
        model = load_to_answer(settings, resolved, observer)
        backend = LocalBackend(model, tokenizer, settings, observer)
        opened = cls(backend, resolved.label, settings.system_prompt)
        if single and not uses_template(tokenizer, settings):
            opened.raw = True
        else:
            check_template(tokenizer, settings.thinking)
        if opened.raw and settings.thinking != "auto":
            raise UsageError("--thinking goes with the chat template", "add --with-prompt")
        return opened

    @property
    def messages(self) -> list[Message]:
        front: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*front, *self.turns]

    @property
    def open_calls(self) -> list[ToolCall]:
        """Calls of the last answer whose results were not given yet."""
        place = next((i for i in reversed(range(len(self.turns))) if self.turns[i]["role"] != "tool"), None)
        if place is None:
            return []
        return self.turns[place].get("tool_calls", [])[len(self.turns) - 1 - place :]

    def ask(self, question: str) -> Deltas:
        """The answer piece by piece. It enters the history when it ends, also where it is stopped early;
        a question that got no word of an answer leaves the history as it was.

        The oldest turns are left out of the prompt where the context is too small for them.

        Raises:
            UsageError: the question alone fills the context, or the template refuses the conversation.
        """
        self.asked, self.draws = question, 0
        return self._answer([{"role": "user", "content": question}])

    def give_result(self, result: str) -> Deltas | None:
        """What the first open call gave. The answer to it; None where results of other calls are still missing.

        Raises:
            UsageError: there is no open call. What `ask` raises.
        """
        calls = self.open_calls
        if not calls:
            raise UsageError("no tool was called", "ask a question")
        said: Message = {"role": "tool", "content": result, "name": calls[0]["name"]}
        if "id" in calls[0]:
            said["tool_call_id"] = calls[0]["id"]
        if len(calls) > 1:
            self.turns.append(said)
            return None
        return self._answer([said])

    def retry(self) -> Deltas | None:
        """Another answer to the last question, in the place of the one before; None if nothing was asked.

        Where answers are drawn (`--temperature`), each attempt is another draw.
        """
        question = self.asked
        last = next((i for i in reversed(range(len(self.turns))) if self.turns[i]["role"] == "user"), None)
        if last is not None and self.asked in (None, self.turns[last]["content"]):
            question = self.turns[last]["content"]
            del self.turns[last:]
        if question is None:
            return None
        self.asked, self.draws = question, self.draws + 1
        return self._answer([{"role": "user", "content": question}])

    def reset(self) -> None:
        """Forget what was said; the system prompt and the tools stay."""
        self.turns, self.asked, self.draws = [], None, 0

    def answer_alone(self, text: str) -> Deltas:
        """Answer a question without a history, in the template or as raw text."""
        self.reset()
        return self.continue_text(text) if self.raw else self.ask(text)

    def _answer(self, asked: Sequence[Message]) -> Deltas:
        prompt, self.dropped = self.backend.fitted_prompt([*self.messages, *asked], tools=self.tools)
        began = time.monotonic()
        said: list[Delta] = []
        pieces = self.backend.deltas(prompt, number=self.draws)
        try:
            for deltas in pieces:
                said += deltas
                yield deltas
        finally:
            pieces.close()
            self.seconds = time.monotonic() - began
            self.thoughts = "".join(one.text for one in said if one.kind == "reasoning")
            message = self._message(said)
            if message["content"] or "tool_calls" in message:
                self.turns += [*asked, message]

    def _message(self, said: Sequence[Delta]) -> Message:
        """The turn of an answer."""
        message: Message = {"role": "assistant", "content": content_of(said)}
        if self.thoughts:
            message["reasoning"] = self.thoughts
        if calls := [one.call for one in said if one.call is not None]:
            message["tool_calls"] = list(with_call_ids(calls, str(len(self.turns)), self.turns))
        return message

    def continue_text(self, text: str) -> Deltas:
        """Continue raw text, outside the conversation.

        Raises:
            UsageError: the text alone fills the context.
        """
        prompt = self.backend.raw_prompt(text)
        refused = self.backend.refusal(prompt)
        if refused:
            raise UsageError(refused, "shorten it")
        began = time.monotonic()
        pieces = self.backend.deltas(prompt)
        try:
            yield from pieces
        finally:
            pieces.close()
            self.seconds = time.monotonic() - began

    @property
    def last(self) -> Answer | None:
        return self.backend.last

    def save(self, path: Path) -> None:
        """Write the conversation as a line that `medgpt sft` reads.

        Raises:
            UsageError: nothing was said yet, the file exists, or it cannot be written. DataError: it would be read as
                something else.
        """
        if not self.turns:
            raise UsageError("there is nothing to save yet", "ask a question first")
        if path.exists():
            raise UsageError(f"{path} exists already", "name another file")
        messages = with_ids(self.messages, short=False)
        record = Record("messages", str(path), str(path), tuple(messages), self.tools)
        try:
            atomic_write(path, line_of(normalised(record)) + "\n")
        except OSError as problem:
            raise UsageError(f"{path}: {problem.strerror}", "name another file") from None

    def load(self, path: Path) -> list[str]:
        """Take up a saved conversation; one that cannot be read leaves this one as it is.

        Returns:
            What is to be known about it, such as keys that nothing was made of.
        """
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise UsageError(f"{path}: {problem.strerror}", "check the path") from None
        except (ValueError, RecursionError):
            raise DataError(f"{path} is not a saved conversation", "`/save FILE` writes one") from None
        counts = Counts()
        record = read_record(Row(str(path), 1, value), counts)
        messages = list(record.messages) if record and not record.answers else []
        if not messages:
            raise DataError(f"{path} is not a saved conversation", "`/save FILE` writes one")
        self.reset()
        if messages[0]["role"] == "system":
            self.system = messages.pop(0)["content"] or self.system
        notes = [*counts.unused_lines(), *counts.merged, *counts.notices]
        if messages and messages[-1]["role"] == "user":
            self.asked = messages.pop()["content"]
            notes.append("its last question has no answer yet: /retry asks it")
        self.turns, self.tools = messages, record.tools
        return notes
