"""A file of questions in, a file of answers out."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.rendering import encode_prompt, encode_raw
from medicalgpt_cli.engine.generation.batching import batches_by_length
from medicalgpt_cli.engine.generation.local import Answer, LocalBackend
from medicalgpt_cli.engine.generation.predictions import PredictionFile
from medicalgpt_cli.engine.generation.questions import Question, read_questions
from medicalgpt_cli.engine.model.loading import load_model, load_tokenizer
from medicalgpt_cli.engine.model.references import ResolvedModel, resolve_models
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import options_of
from medicalgpt_cli.settings.stages import InferSettings


def run_infer(settings: InferSettings, observer: Observer) -> dict[str, Any]:
    """Answer every question of `--data-file`; rows that cannot be answered get an error field.

    Returns:
        rows, failed, resumed, completion tokens, seconds, tokens a second, file; exit_code 2 if all failed.

    Raises:
        DataError, UsageError: the questions or settings are wrong, or the predictions file exists.
    """
    questions = read_questions(settings.data_file)
    resolved = resolve_models(settings)
    tokenizer = load_tokenizer(settings, resolved, observer, plain_template=settings.with_prompt is True)
    prompts = [encode_question(tokenizer, question, settings) for question in questions]
    output = _output(settings, questions, resolved, tokenizer)
    model = load_model(settings, resolved, observer=observer)
    backend = LocalBackend(model, tokenizer, settings)

    left = [number for number in range(len(questions)) if number not in output.rows]
    resumed, tokens = len(questions) - len(left), 0
    task, began, done = "answering", time.monotonic(), resumed
    observer.on_task_start(task, len(questions), "questions")
    try:
        for batch in batches_by_length([len(prompts[number]) for number in left], settings.batch_size):
            numbers = [left[place] for place in batch]

            def keep(place: int, answer: Answer, numbers: list[int] = numbers) -> None:
                nonlocal done, tokens
                done, tokens = done + 1, tokens + answer.completion_tokens
                output.add(numbers[place], prediction(questions[numbers[place]], answer))
                observer.on_task_advance(task, done)

            backend.answer_batch([prompts[number] for number in numbers], keep, numbers=numbers)
            output.sync()
    finally:
        observer.on_task_end(task)
        output.close()
    seconds = time.monotonic() - began
    failed = sum("error" in row for row in output.rows.values())
    path = output.finish()
    return {
        "rows": len(questions),
        "failed": failed,
        "resumed": resumed,
        "completion_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "file": str(path),
        "exit_code": 2 if failed == len(questions) else 0,
    }


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: Question, settings: InferSettings
) -> list[int]:
    """Token ids of a question: in the chat template, or the raw text with `--no-prompt`.

    Raises:
        UsageError: raw text was asked for, but the question is a conversation.
    """
    if not uses_template(tokenizer, settings):
        if not isinstance(question.input, str):
            raise UsageError(
                f"{question.at}: a conversation cannot be continued as raw text", "add --with-prompt"
            )
        if settings.system_prompt:
            raise UsageError("--system-prompt goes with the chat template", "add --with-prompt")
        return encode_raw(tokenizer, question.input)
    return encode_prompt(tokenizer, with_system(question.messages, settings.system_prompt))


def uses_template(tokenizer: PreTrainedTokenizerBase, settings: InferSettings) -> bool:
    """Whether questions go into the chat template; where nothing was said, if the model has one."""
    return bool(tokenizer.chat_template) if settings.with_prompt is None else settings.with_prompt


def with_system(messages: Any, system_prompt: str | None) -> list[Any]:
    """The messages behind the system prompt, unless they bring one of their own."""
    if system_prompt and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system_prompt}, *messages]
    return list(messages)


def prediction(question: Question, answer: Answer) -> dict[str, Any]:
    """A row of the predictions file."""
    row = {
        "id": question.id,
        "input": question.input,
        "output": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }
    return row if answer.error is None else {**row, "error": answer.error}


@dataclass
class _StandardOutput:
    """JSON lines on standard output, in the order of the questions, each as soon as all before it are there."""

    rows: dict[int, dict[str, Any]]
    written: int = 0

    def add(self, number: int, row: dict[str, Any]) -> None:
        self.rows[number] = row
        while self.written in self.rows:
            sys.stdout.write(json.dumps(self.rows[self.written], ensure_ascii=False) + "\n")
            self.written += 1
        sys.stdout.flush()

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def finish(self) -> str:
        return "-"


def _output(
    settings: InferSettings,
    questions: list[Question],
    resolved: ResolvedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    if settings.predictions_file == "-":
        return _StandardOutput({})
    free = {
        "json",
        "debug",
        "resume",
        "overwrite",
        "batch_size",
        "predictions_file",
        "data_file",
        "interactive",
    }
    chosen = {name: str(getattr(settings, name)) for name in options_of(settings) if name not in free}
    asked = [(question.id, question.messages) for question in questions]
    identity = {
        "questions": _hash(asked),
        "settings": _hash(chosen),
        "model": _hash(
            [resolved.base.path, resolved.adapter and resolved.adapter.path, fingerprint(tokenizer)]
        ),
    }
    return PredictionFile(
        Path(settings.predictions_file), identity, resume=settings.resume, overwrite=settings.overwrite
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=str).encode()).hexdigest()
