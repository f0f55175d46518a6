"""Answers from an OpenAI-compatible server: vLLM, SGLang, llama.cpp's server, or `medgpt serve-demo` itself.

The same face as `local.py`. What is sent are messages; the server knows its model's template. No proxy of the
environment is used, and no message of the server is shown, since it may quote what was sent.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.tool_messages import as_functions
from medicalgpt_cli.engine.data.tools import Delta
from medicalgpt_cli.engine.generation.answer_reader import content_of
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.endpoint_replies import (
    add_calls,
    deltas_of,
    deltas_of_calls,
    events_of,
    json_of,
    put_together,
)
from medicalgpt_cli.engine.generation.wire import conversation_to_wire
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import EnvironmentFailure, MedgptError, UsageError
from medicalgpt_cli.settings.groups import EndpointSettings, SamplingSettings

KEY_VARIABLE = "MEDGPT_ENDPOINT_KEY"
_ATTEMPTS = 6  # at a server that is busy
_LONGEST_WAIT = 30.0
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)

# Deltas as they come; the answer comes with the last ones.
Events = Generator[tuple[list[Delta], Answer | None], None, None]


class _Refused(UsageError):
    """The server does not take this request."""


@dataclass(frozen=True)
class RemotePrompt:
    """What is sent: a conversation, or raw text to continue."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: Thinking = "auto"

    def __len__(self) -> int:
        """Characters: what requests of similar length are gathered by."""
        return len(self.text or "") + sum(len(one["content"]) for one in self.messages)


class EndpointBackend:
    """Answers prompts with the model of another server."""

    def __init__(self, url: str, model: str, key: str | None, sampling: SamplingSettings, parallel: int = 1):
        self.url, self.model, self.sampling, self.parallel = url, model, sampling, parallel
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(
            headers=headers, timeout=_TIMEOUT, trust_env=False, limits=httpx.Limits(max_connections=None)
        )
        self.last: Answer | None = None

    @classmethod
    def open(cls, settings: EndpointSettings, observer: Observer, parallel: int = 1) -> EndpointBackend:
        """Find the server and its model.

        Raises:
            EnvironmentFailure: the server cannot be reached, or refuses the key.
            UsageError: it has several models and none was named.
        """
        url = settings.endpoint.rstrip("/")
        url = url if url.endswith("/v1") else f"{url}/v1"
        parts = urlsplit(url)
        local = parts.hostname in ("localhost", "::1") or (parts.hostname or "").startswith("127.")
        if parts.scheme == "http" and not local:
            observer.on_warning(f"what is asked goes to {parts.hostname} without encryption (http)")
        backend = cls(url, settings.endpoint_model or "", _key(settings), settings, parallel)
        if settings.endpoint_model is None:  # else the server itself says whether it has that one
            names = backend._models()
            if len(names) != 1:
                raise UsageError(
                    f"{url} has {len(names)} models", f"--endpoint-model, one of: {', '.join(names[:8])}"
                )
            backend.model = names[0]
        return backend

    reads_calls = True  # the server does, or says that it does not

    def close(self) -> None:
        self._client.close()

    # -- prompts -----------------------------------------------------------------------------------------------

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: Thinking | None = None,
    ) -> RemotePrompt:
        return RemotePrompt(tuple(messages), None, tuple(tools), thinking or self.sampling.thinking)

    def fitted_prompt(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: Thinking | None = None,
    ) -> tuple[RemotePrompt, int]:
        """The server knows what fits its context: nothing is left out here."""
        return self.prompt(messages, tools, thinking), 0

    def raw_prompt(self, text: str) -> RemotePrompt:
        return RemotePrompt(text=text)

    def bounded_prompt(
        self,
        asked: Sequence[Message] | str,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: Thinking | None = None,
    ) -> RemotePrompt:
        return self.raw_prompt(asked) if isinstance(asked, str) else self.prompt(asked, tools, thinking)

    def for_another_thread(self) -> EndpointBackend:
        return self

    def refusal(self, prompt: RemotePrompt) -> str | None:
        return None if len(prompt) else "empty prompt"

    # -- answers -----------------------------------------------------------------------------------------------

    def answer_batch(
        self,
        prompts: Sequence[RemotePrompt],
        on_done: Callable[[int, Answer], None],
        *,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Answer prompts at the same time; the server batches them.

        Raises:
            EnvironmentFailure: the server is gone. What was answered has been handed over.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(max(self.parallel, 1), "endpoint") as pool:
            futures = {
                pool.submit(self._answer, prompt, numbers[i] if numbers else i, stop): i
                for i, prompt in enumerate(prompts)
            }
            try:
                for future in as_completed(futures):
                    on_done(futures[future], future.result())
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def stream(self, prompt: RemotePrompt, *, number: int = 0) -> Iterator[str]:
        """The text of the answer piece by piece, without reasoning and calls; see `deltas`."""
        pieces = self.deltas(prompt, number=number)
        try:
            for piece in pieces:
                yield content_of(piece)
        finally:
            pieces.close()

    def deltas(self, prompt: RemotePrompt, *, number: int = 0) -> Generator[list[Delta], None, None]:
        """Answer one prompt piece by piece; the whole is in `last` afterwards. Close it to stop early.

        Raises:
            UsageError: the server refuses the request.
            EnvironmentFailure: the server cannot be reached.
        """
        said: list[Delta] = []
        self.last = None
        pieces = self.events(prompt, self.sampling, number)
        try:
            for deltas, answer in pieces:
                said += deltas
                self.last = answer
                yield deltas
        finally:
            pieces.close()
            self.last = self.last or put_together(said, "stop", {}, len(said))

    def events(self, prompt: RemotePrompt, sampling: SamplingSettings, number: int = 0) -> Events:
        """Deltas as they come; calls of tools, put together, and the answer come at the end."""
        body = {**self.body(prompt, sampling, number), "stream": True}
        body["stream_options"] = {"include_usage": True}
        said: list[Delta] = []
        calls: dict[int, dict[str, Any]] = {}
        reason, usage = "stop", {}
        with contextlib.closing(self._open("POST", self._path(prompt), body)) as reply:
            for event in events_of(reply):
                if "error" in event:
                    raise EnvironmentFailure(f"{self.url} broke off its answer", "ask again")
                usage = event.get("usage") or usage
                for choice in event.get("choices") or []:
                    reason = choice.get("finish_reason") or reason
                    delta = choice.get("delta") or choice
                    add_calls(calls, delta.get("tool_calls"))
                    deltas = deltas_of(delta)
                    said += deltas
                    yield deltas, None
        last = deltas_of_calls([calls[index] for index in sorted(calls)])
        said += last
        yield last, put_together(said, reason, usage, len(said))

    def _answer(self, prompt: RemotePrompt, number: int, stop: threading.Event) -> Answer:
        if stop.is_set():
            return Answer("", [], "error", 0, 0, "not asked")
        try:
            with contextlib.closing(
                self._open("POST", self._path(prompt), self.body(prompt, self.sampling, number))
            ) as reply:
                found = json_of(reply)
        except _Refused as problem:  # this question; the others may be fine
            return Answer("", [], "error", 0, 0, problem.message)
        choice = (found.get("choices") or [{}])[0]
        message = choice.get("message") or choice
        calls = message.get("tool_calls")
        deltas = [*deltas_of(message), *deltas_of_calls(calls if isinstance(calls, list) else [])]
        return put_together(deltas, choice.get("finish_reason") or "stop", found.get("usage") or {})

    # -- the wire ------------------------------------------------------------------------------------------------

    def _path(self, prompt: RemotePrompt) -> str:
        return "/chat/completions" if prompt.text is None else "/completions"

    def body(self, prompt: RemotePrompt, sampling: SamplingSettings, number: int) -> dict[str, Any]:
        """
        Raises:
            UsageError: a setting that OpenAI's interface has no word for.
        """
        if sampling.repetition_penalty != 1 or sampling.no_repeat_ngram:
            raise UsageError(
                "repetition_penalty and no_repeat_ngram: the server behind this one has no such setting"
            )
        asked: dict[str, Any] = {"prompt": prompt.text}
        if prompt.text is None:
            asked = {"messages": conversation_to_wire(prompt.messages)}
        body = {
            "model": self.model,
            **asked,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": (sampling.seed + number) % 2**31,
        }
        if prompt.tools:
            body["tools"] = as_functions(prompt.tools)
        if prompt.thinking != "auto":  # templates call their switch by one of two names
            on = prompt.thinking == "on"
            body["chat_template_kwargs"] = {"enable_thinking": on, "thinking": on}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        return body

    def _models(self) -> list[str]:
        with contextlib.closing(self._open("GET", "/models")) as reply:
            found = json_of(reply).get("data")
        names = [one.get("id") for one in found] if isinstance(found, list) else []
        return [name for name in names if isinstance(name, str)]

    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The server's answer, its content unread; waits where the server is busy.

        Raises:
            UsageError: the server refuses the request itself.
            EnvironmentFailure: it cannot be reached, refuses the key, stays busy or fails.
        """
        for attempt in range(_ATTEMPTS):
            request = self._client.build_request(method, self.url + path, json=body)
            try:
                reply = self._client.send(request, stream=True)
            except httpx.HTTPError as problem:
                raise EnvironmentFailure(
                    f"{self.url} cannot be reached ({type(problem).__name__})", "is the server running?"
                ) from None
            if reply.status_code < 300:
                return reply
            reply.close()
            if reply.status_code not in (429, 503) or attempt == _ATTEMPTS - 1:
                break
            asked = reply.headers.get("retry-after", "")
            time.sleep(min(float(asked) if asked.isdigit() else 2.0**attempt, _LONGEST_WAIT))
        raise _refusal(self.url, reply.status_code, path)


def _key(settings: EndpointSettings) -> str | None:
    """
    Raises:
        UsageError: the key file cannot be read.
    """
    if settings.endpoint_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        return settings.endpoint_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        word = getattr(problem, "strerror", None) or "not text"
        raise UsageError(
            f"--endpoint-key-file {settings.endpoint_key_file}: {word}", "check the path"
        ) from None


def _refusal(url: str, status: int, path: str) -> MedgptError:
    if status in (401, 403):
        return EnvironmentFailure(
            f"{url} refuses the key ({status})", f"--endpoint-key-file FILE, or the variable {KEY_VARIABLE}"
        )
    if status in (400, 413, 422):
        return _Refused(
            f"the server refuses the request ({status})",
            "does it fit the model's context? does it take these options?",
        )
    if status == 404:
        return UsageError(
            f"{url} has no {path}, or not this model ({status})", "check the address and --endpoint-model"
        )
    word = "is busy" if status in (429, 503) else "failed"
    return EnvironmentFailure(f"{url} {word} ({status})", "try again later")
