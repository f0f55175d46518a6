"""One conversation with a model: history, what fits the context, one answer at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.endpoint import EndpointBackend
from medicalgpt_cli.engine.generation.infer import uses_template
from medicalgpt_cli.engine.generation.local import LocalBackend, load_to_answer
from medicalgpt_cli.engine.model.loading import load_tokenizer
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import ChatSettings, InferSettings


class Conversation:
    """What was said, and the model that answers."""

    def __init__(self, backend: LocalBackend | EndpointBackend, label: str, system: str | None):
        self.backend, self.label, self.system = backend, label, system
        self.turns: list[Message] = []
        self.asked: str | None = None  # the last question, also where it got no answer
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
        return opened

    @property
    def messages(self) -> list[Message]:
        front: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*front, *self.turns]

    def ask(self, question: str) -> Iterator[str]:
        """The answer piece by piece. It enters the history when it ends, also where it is stopped early;
        a question that got no word of an answer leaves the history as it was.

        The oldest turns are left out of the prompt where the context is too small for them.

        Raises:
            UsageError: the question alone fills the context, or the template refuses the conversation.
        """
        self.asked, self.draws = question, 0
        return self._answer(question)

    def retry(self) -> Iterator[str] | None:
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
        return self._answer(question)

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns, self.asked, self.draws = [], None, 0

    def answer_alone(self, text: str) -> Iterator[str]:
        """Answer a question without a history, in the template or as raw text."""
        self.reset()
        return self.continue_text(text) if self.raw else self.ask(text)

    def _answer(self, question: str) -> Iterator[str]:
        asked: Message = {"role": "user", "content": question}
        prompt, self.dropped = self.backend.fitted_prompt([*self.messages, asked])
        began, said = time.monotonic(), ""
        pieces = self.backend.stream(prompt, number=self.draws)
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            pieces.close()
            self.seconds = time.monotonic() - began
            if said:
                self.turns += [asked, {"role": "assistant", "content": said}]

    def continue_text(self, text: str) -> Iterator[str]:
        """Continue raw text, outside the conversation.

        Raises:
            UsageError: the text alone fills the context.
        """
        prompt = self.backend.raw_prompt(text)
        refused = self.backend.refusal(prompt)
        if refused:
            raise UsageError(refused, "shorten it")
        began = time.monotonic()
        pieces = self.backend.stream(prompt)
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
            UsageError: nothing was said yet, the file exists, or it cannot be written.
        """
        if not self.turns:
            raise UsageError("there is nothing to save yet", "ask a question first")
        if path.exists():
            raise UsageError(f"{path} exists already", "name another file")
        try:
            atomic_write(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as problem:
            raise UsageError(f"{path}: {problem.strerror}", "name another file") from None

    def load(self, path: Path) -> None:
        """Take up a saved conversation; one that cannot be read leaves this one as it is."""
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise UsageError(f"{path}: {problem.strerror}", "check the path") from None
        except (ValueError, RecursionError):
            raise DataError(f"{path} is not a saved conversation", "`/save FILE` writes one") from None
        record = read_record(Row(str(path), 1, value), Counts())
        messages = list(record.messages) if record else []
        if not messages:
            raise DataError(f"{path} is not a saved conversation", "`/save FILE` writes one")
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.reset()
        self.turns = [one for one in messages if one["role"] != "system"]
        self.system = system or self.system
