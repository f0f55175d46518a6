"""One conversation with a model: history, what fits the context, one answer at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.data.formats import Counts, Message, messages_of
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.rendering import encode_prompt, encode_raw, fit_history
from medicalgpt_cli.engine.generation.infer import uses_template
from medicalgpt_cli.engine.generation.local import Answer, LocalBackend
from medicalgpt_cli.engine.model.loading import load_model, load_tokenizer
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import ChatSettings, InferSettings


class Conversation:
    """What was said, and the model that answers."""

    def __init__(self, backend: LocalBackend, label: str, system: str | None):
        self.backend, self.label, self.system = backend, label, system
        self.turns: list[Message] = []
        self.dropped = 0  # turns left out of the last prompt because the context was full
        self.seconds = 0.0  # that the last answer took
        self.raw = False  # whether `answer_alone` continues raw text instead of using the template

    @classmethod
    def open(cls, settings: ChatSettings | InferSettings, observer: Observer) -> Conversation:
        """Load the model of the settings."""
        resolved = resolve_models(settings)
        single = isinstance(settings, InferSettings)
        plain = settings.with_prompt is True if single else True
        tokenizer = load_tokenizer(settings, resolved, observer, plain_template=plain)
        model = load_model(settings, resolved, observer=observer)
        opened = cls(LocalBackend(model, tokenizer, settings), resolved.label, settings.system_prompt)
        if single and not uses_template(tokenizer, settings):
            opened.raw = True
        return opened

    @property
    def messages(self) -> list[Message]:
        front: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*front, *self.turns]

    def ask(self, question: str) -> Iterator[str]:
        """The answer piece by piece. It enters the history when it ends, also where it is stopped early.

        The oldest turns are left out of the prompt where the context is too small for them.

        Raises:
            UsageError: the question alone fills the context; the history is as before.
        """
        self.turns.append({"role": "user", "content": question})
        tokenizer = self.backend.tokenizer
        room = max(self.backend.context - self.backend.sampling.max_new_tokens, self.backend.context // 2)
        kept, self.dropped = fit_history(tokenizer, self.messages, room)
        prompt = encode_prompt(tokenizer, kept)
        if len(prompt) >= self.backend.context:
            self.turns.pop()
            raise UsageError(
                f"the question has {len(prompt)} tokens, the context {self.backend.context}",
                "ask a shorter one",
            )
        yield from self._stream(prompt)

    def _stream(self, prompt: list[int]) -> Iterator[str]:
        began = time.monotonic()
        said = ""
        pieces = self.backend.stream(prompt)
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            pieces.close()
            self.seconds = time.monotonic() - began
            self.turns.append({"role": "assistant", "content": said})

    def continue_text(self, text: str) -> Iterator[str]:
        """Continue raw text, outside the conversation."""
        began = time.monotonic()
        yield from self.backend.stream(encode_raw(self.backend.tokenizer, text))
        self.seconds = time.monotonic() - began

    def answer_alone(self, text: str) -> Iterator[str]:
        """Answer a question without a history, in the template or as raw text."""
        self.turns = []
        return self.continue_text(text) if self.raw else self.ask(text)

    def retry(self) -> str | None:
        """Take back the last question and its answer; gives the question, or None if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    @property
    def last(self) -> Answer | None:
        return self.backend.last

    def save(self, path: Path) -> None:
        """Write the conversation as a line that `medgpt sft` reads.

        Raises:
            UsageError: the file exists.
        """
        if path.exists():
            raise UsageError(f"{path} exists already", "name another file")
        atomic_write(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Take up a saved conversation; one that cannot be read leaves this one as it is."""
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise UsageError(f"{path}: {problem.strerror}", "check the path") from None
        except ValueError:
            raise DataError(f"{path} is not a saved conversation", "`/save FILE` writes one") from None
        messages, _ = messages_of(Row(str(path), 1, value), Counts())
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.turns = [one for one in messages if one["role"] != "system"]
        self.system = system or self.system
