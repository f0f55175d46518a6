"""A file of questions in, a file of answers out."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_targets import tool_notes
from medicalgpt_cli.engine.data.rendering import check_template, encode_prompt, encode_raw
from medicalgpt_cli.engine.data.template_facts import template_facts
from medicalgpt_cli.engine.generation.answer_reader import EncodedPrompt
from medicalgpt_cli.engine.generation.batching import batches_by_length
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.endpoint import EndpointBackend, RemotePrompt
from medicalgpt_cli.engine.generation.helpers import Helpers, even_batch_size, help_out
from medicalgpt_cli.engine.generation.local import LocalBackend, load_to_answer
from medicalgpt_cli.engine.generation.predictions import PredictionFile, StandardOutput
from medicalgpt_cli.engine.generation.questions import Question, counts_of_questions, read_questions
from medicalgpt_cli.engine.generation.wire import call_to_wire, finish_reason, with_call_ids
from medicalgpt_cli.engine.model.base_record import describe
from medicalgpt_cli.engine.model.loading import load_tokenizer
from medicalgpt_cli.engine.model.quantization import check_quantization
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.errors import Stopped, UsageError
from medicalgpt_cli.settings.fields import flag_of, options_of
from medicalgpt_cli.settings.stages import InferSettings


def run_infer(settings: InferSettings, observer: Observer) -> dict[str, Any]:
    """Answer every question of `--data-file`; rows that cannot be answered get an error field.

    Returns:
        rows, failed, resumed, completion tokens, seconds, tokens a second, file; exit_code 2 if all failed.

    Raises:
        DataError, UsageError: the questions or settings are wrong, or the predictions file exists.
    """
    check_connection()
    counts = counts_of_questions(settings)
    questions = read_questions(settings.data_file, counts)
    model = (_RemoteModel if settings.endpoint else LocalModel)(settings, observer)
    prompts = [model.prompt(question) for question in questions]
    merged = [f"{number:,} of {counts.read:,} records: {reason}" for reason, number in counts.merged.items()]
    for line in [*counts.unused_lines(), *merged, *counts.notices, *model.notes(questions)]:
        observer.on_notice(line)
    output = _output(settings, questions, model.identity())
    resumed, began = len(output.rows), time.monotonic()
    try:
        backend = model.load()
        began = time.monotonic()
        tokens = _answer_all(backend, questions, prompts, output, settings.batch_size, observer)
        seconds = time.monotonic() - began
        path = output.finish()
    except (KeyboardInterrupt, Stopped) as stop:
        raise _stopped(stop, output, len(questions)) from None
    finally:
        output.close()
    failed = sum("error" in row for row in output.rows.values())
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


def _answer_all(
    backend: LocalBackend | EndpointBackend,
    questions: list[Question],
    prompts: list[EncodedPrompt | RemotePrompt | Refused],
    output: Any,
    batch_size: int,
    observer: Observer,
) -> int:
    """Answer what is not in `output` yet, with the run's other processes; gives the number of tokens written."""
    task, done, tokens, malformed = "answering", len(output.rows), 0, 0
    one_at_a_time = threading.RLock()
    observer.on_task_start(task, len(questions), "questions")
    observer.on_task_advance(task, done)

    def keep(number: int, answer: Answer) -> None:
        nonlocal done, tokens, malformed
        with one_at_a_time:
            done, tokens = done + 1, tokens + answer.completion_tokens
            malformed += answer.malformed
            output.add(number, prediction(questions[number], answer))
            observer.on_task_advance(task, done)

    left = [number for number in range(len(questions)) if number not in output.rows]
    asked = [number for number in left if not isinstance(prompts[number], Refused)]
    size = even_batch_size(len(asked), batch_size, processes.size())
    batches = batches_by_length([len(prompts[number]) for number in asked], size)

    def take() -> tuple[list[int], list[Any]] | None:
        with one_at_a_time:
            numbers = [asked[place] for place in next(batches, [])]
        return (numbers, [prompts[number] for number in numbers]) if numbers else None

    try:
        for number in left:
            if isinstance(prompts[number], Refused):
                keep(number, Answer("", [], "error", 0, 0, prompts[number].why))
        with Helpers(processes.channels(), take, keep, output.sync) as helpers:

            def mine(number: int, answer: Answer) -> None:
                keep(number, answer)
                helpers.check()

            while (work := take()) is not None:
                numbers, texts = work
                backend.answer_batch(
                    texts,
                    lambda place, answer, numbers=numbers: mine(numbers[place], answer),
                    numbers=numbers,
                )
                output.sync()
            helpers.finish()
    finally:
        observer.on_task_end(task)
    if malformed:
        observer.on_notice(
            f"{malformed:,} answers hold what looks like a call of a tool and is none: it is text"
        )
    return tokens


def help_infer(settings: InferSettings) -> None:
    """What the other processes of a run do: load the same model and answer what the first one hands out."""
    check_connection()
    help_out(LocalModel(settings, Observer()).load())


def check_connection() -> None:
    """
    Raises:
        UsageError: several processes were started by something that does not connect them.
    """
    if processes.size() > 1 and not processes.channels():
        raise UsageError(
            f"{processes.size()} processes were started around medgpt infer",
            "give --processes to infer itself",
        )


def _stopped(stop: BaseException, output: Any, total: int) -> Stopped:
    """The word at Ctrl-C or a signal: what is kept, and how to go on."""
    kept = isinstance(output, PredictionFile) and output.rows
    where = f"; {len(output.rows)} of {total} answers are in {output.partial}" if kept else ""
    hint = "the same command with --resume goes on" if kept else None
    return Stopped(f"stopped{where}", hint, exit_code=getattr(stop, "exit_code", 130))


@dataclass(frozen=True)
class Refused:
    """A question that the chat template does not take; the others can still be answered."""

    why: str


class LocalModel:
    """A model in this process. Its tokenizer comes first, so that what is wrong with a question is said at once."""

    def __init__(self, settings: InferSettings, observer: Observer):
        self.settings, self.observer = settings, observer
        self.resolved = resolve_models(settings)
        check_quantization(self.resolved, settings.quantization)
        plain = settings.with_prompt is True
        self.tokenizer = load_tokenizer(settings, self.resolved, observer, plain_template=plain)
        if uses_template(self.tokenizer, settings):
            check_template(self.tokenizer, settings.thinking)

    def prompt(self, question: Question) -> EncodedPrompt | Refused:
        """A question in the chat template, or the raw text with `--no-prompt`.

        Raises:
            UsageError: raw text was asked for, but the question is a conversation.
        """
        if not uses_template(self.tokenizer, self.settings):
            return EncodedPrompt(encode_raw(self.tokenizer, raw_text(question, self.settings)), raw=True)
        messages = with_system(question.messages, self.settings.system_prompt)
        thinking = self.settings.thinking
        try:
            ids = encode_prompt(self.tokenizer, messages, question.tools, thinking)
        except UsageError as problem:
            return Refused(problem.message)
        return EncodedPrompt(ids, question.tools, thinking)

    def notes(self, questions: Sequence[Question]) -> list[str]:
        """What is to be known about tools in the questions and the template."""
        if not uses_template(self.tokenizer, self.settings):
            return []
        notes = Counter(
            note for one in questions for note in tool_notes(self.tokenizer, one.messages, one.tools)
        )
        found = [f"{number:,} of {len(questions):,} questions: {note}" for note, number in notes.items()]
        if any(one.tools for one in questions) and template_facts(self.tokenizer).tools.form is None:
            found.append("calls of tools cannot be told from text in what this template has a model write")
        return found

    def identity(self) -> dict[str, str]:
        models = [one for one in (self.resolved.base, self.resolved.adapter) if one is not None]
        return {
            "the model": _hash([describe(one, self.observer) or one.path for one in models]),
            "the tokenizer or template": fingerprint(self.tokenizer),
        }

    def load(self) -> LocalBackend:
        model = load_to_answer(self.settings, self.resolved, self.observer)
        return LocalBackend(model, self.tokenizer, self.settings, self.observer)


class _RemoteModel:
    """A model behind another server, which knows its template."""

    def __init__(self, settings: InferSettings, observer: Observer):
        self.settings = settings
        self.backend = EndpointBackend.open(settings, observer, parallel=settings.batch_size)

    def prompt(self, question: Question) -> RemotePrompt:
        if self.settings.with_prompt is False:
            return self.backend.raw_prompt(raw_text(question, self.settings))
        messages = with_system(question.messages, self.settings.system_prompt)
        return self.backend.prompt(messages, question.tools)

    def notes(self, questions: Sequence[Question]) -> list[str]:
        return []

    def identity(self) -> dict[str, str]:
        return {"the endpoint": self.backend.url, "the endpoint's model": self.backend.model}

    def load(self) -> EndpointBackend:
        return self.backend


def raw_text(question: Question, settings: InferSettings) -> str:
    """The text that is continued with `--no-prompt`.

    Raises:
        UsageError: the question is a conversation or has tools, or there is a system prompt or a word about reasoning.
    """
    if not isinstance(question.input, str) or question.tools:
        what = "a question with tools" if question.tools else "a conversation"
        raise UsageError(f"{question.at}: {what} cannot be continued as raw text", "add --with-prompt")
    if settings.thinking != "auto":
        raise UsageError("--thinking goes with the chat template", "add --with-prompt")
    if settings.system_prompt:
        raise UsageError("--system-prompt goes with the chat template", "add --with-prompt")
    return question.input


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
    calls = with_call_ids(answer.tool_calls, question.id, question.messages)
    row: dict[str, Any] = {"id": question.id, "input": question.input, "output": answer.text}
    if answer.reasoning:
        row["reasoning_content"] = answer.reasoning
    if calls:
        row["tool_calls"] = [call_to_wire(call) for call in calls]
    row |= {
        "finish_reason": finish_reason(answer.finish_reason, calls),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }
    return row if answer.error is None else {**row, "error": answer.error}


def _output(settings: InferSettings, questions: list[Question], model: dict[str, str]) -> Any:
    if settings.predictions_file == "-":
        return StandardOutput({})
    return PredictionFile(
        Path(settings.predictions_file),
        _identity(settings, questions, model),
        resume=settings.resume,
        overwrite=settings.overwrite,
    )


# What may change between an interrupted run and its resume. The model's own options count by what they lead to.
_FREE = {"json", "debug", "resume", "overwrite", "batch_size", "predictions_file", "data_file", "interactive"}
_FREE |= {"base_model", "lora_model", "tokenizer_path", "template"}
_FREE |= {"processes", "gpus"}  # who computes an answer changes nothing in it
_FREE |= {"endpoint", "endpoint_model", "endpoint_key_file"}


def _identity(settings: InferSettings, questions: list[Question], model: dict[str, str]) -> dict[str, str]:
    """What an answer depends on, as fingerprints and values."""
    chosen = {
        flag_of(name): str(getattr(settings, name)) for name in options_of(settings) if name not in _FREE
    }
    asked = _hash([(question.id, question.messages, question.tools) for question in questions])
    return {"the questions": asked, **model, **chosen}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, default=str).encode()).hexdigest()
