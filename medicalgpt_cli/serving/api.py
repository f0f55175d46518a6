"""The OpenAI-compatible routes. A field is honoured or refused with 400, never ignored (docs/serving.md)."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from medicalgpt_cli.engine.data.naming import looks_like_a_name
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.serving.answers import Answers, Asked, Listening
from medicalgpt_cli.serving.api_fields import (
    COLDEST,
    NOT_TAKEN,
    WARMEST,
    ChatRequest,
    CompletionRequest,
    Refused,
    Sampling,
    error_body,
)
from medicalgpt_cli.serving.metrics import exposition
from medicalgpt_cli.settings.groups import SamplingSettings

if TYPE_CHECKING:
    from medicalgpt_cli.engine.data.messages import ToolCall
    from medicalgpt_cli.engine.generation.decoding import Answer

_SILENCE = 15.0  # seconds after which a waiting stream gets a comment, so that proxies keep it open
_FIELDS = {"content": "content", "reasoning": "reasoning_content"}  # of a streamed delta
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")


def add_api(app: FastAPI, answers: Answers) -> None:
    """Add the routes and the shape of their errors."""
    router = APIRouter()
    created = int(time.time())
    errors = {
        status: {"description": "refused"} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
    }

    @router.post("/v1/chat/completions", responses=errors)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _complete(_Job(answers, body, request, chat=True))

    @router.post("/v1/completions", responses=errors)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _complete(_Job(answers, body, request, chat=False))

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "medgpt"}

    @router.get("/v1/models", responses=errors)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in answers.models]}

    @router.get("/v1/models/{model:path}", responses=errors)
    async def one_model(model: str) -> dict[str, Any]:
        if model not in answers.models:
            raise _no_such_model(answers)
        return described(model)

    @router.get("/health", responses=errors)
    async def health() -> JSONResponse:
        alive = answers.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "broken"}, 200 if alive else 500)

    @router.get("/metrics", response_class=PlainTextResponse, responses=errors)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(exposition(answers.scheduler), media_type="text/plain; version=0.0.4")

    app.include_router(router)
    _add_errors(app)
    for name in ("ChatRequest", "CompletionRequest"):  # the document says which models there are
        app.openapi()["components"]["schemas"][name]["properties"]["model"]["enum"] = list(answers.models)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, problem: Refused) -> JSONResponse:
        headers = {"Retry-After": str(problem.retry_after)} if problem.retry_after else None
        body = error_body(problem.status, problem.message, problem.param, problem.code)
        return JSONResponse(body, problem.status, headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, problem: HTTPException) -> JSONResponse:
        body = error_body(problem.status_code, str(problem.detail))
        return JSONResponse(body, problem.status_code, problem.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, problem: RequestValidationError) -> JSONResponse:
        """Says which field is wrong and why, and never quotes what was sent."""
        first = problem.errors()[0]
        # What a field may be ("str") stands in the path, too. A field that is not ours is a word of the client's.
        path = [part for part in first["loc"] if part not in ("body", "str", "constrained-str")]
        named = [str(part) if isinstance(part, int) or looks_like_a_name(part) else "?" for part in path]
        place = ".".join(named)
        words = {
            "extra_forbidden": "this field is not supported",
            "json_invalid": "the body is not valid JSON",
            "literal_error": "this value is not supported",
        }
        what = words.get(first["type"], first["msg"])
        if first["type"] not in ("missing", "json_invalid"):
            what = next((NOT_TAKEN[part] for part in reversed(path) if part in NOT_TAKEN), what)
        message = f"{place}: {what}" if place and first["type"] != "json_invalid" else what
        return JSONResponse(error_body(400, message, place or None), 400)


class _Job:
    """One request, and the names under which its answer goes back."""

    def __init__(
        self, answers: Answers, body: ChatRequest | CompletionRequest, request: Request, *, chat: bool
    ):
        self.answers, self.body, self.request, self.chat = answers, body, request, chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.kind = "chat.completion" if chat else "text_completion"
        self.created = int(time.time())

    @cached_property
    def asked(self) -> Asked:
        if not self.chat:
            prompt = self.body.prompt
            return Asked(prompt if isinstance(prompt, str) else prompt[0])
        messages = [one.plain for one in self.body.messages]
        system = self.answers.sampling.system_prompt
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return Asked(messages, self.body.offered, self.body.thinking)

    def called(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        """Calls in an answer, each with an id that no other call of the conversation has."""
        from medicalgpt_cli.engine.generation.wire import call_to_wire, with_call_ids

        history = self.asked.messages if self.chat else ()
        return [call_to_wire(call) for call in with_call_ids(calls, self.id, history)]

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk and self.chat else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}


async def _complete(job: _Job) -> Response:
    from medicalgpt_cli.engine.data.rendering import NoSwitch
    from medicalgpt_cli.engine.generation.scheduler import Busy

    if job.body.model not in job.answers.models:
        raise _no_such_model(job.answers)
    if job.body.stream_options is not None and not job.body.stream:
        raise Refused("stream_options goes with stream", "stream_options")
    if job.body.offered and not job.answers.reader.reads_calls:
        raise Refused("calls cannot be told from text in what this model's template has it write", "tools")
    sampling = sampling_of(job.body, job.answers.sampling)
    try:
        listening = await job.answers.ask(
            job.asked, sampling, client=job.request.state.client, model=job.body.model
        )
    except Busy as problem:
        raise refused_busy(problem) from None
    except ValueError as problem:  # no room in the context
        raise Refused(str(problem), "messages", code="context_length_exceeded") from None
    except NoSwitch:
        raise Refused("the chat template has no switch for reasoning", "chat_template_kwargs") from None
    except UsageError as problem:
        raise Refused(problem.message, "messages") from None
    if job.body.stream:
        return StreamingResponse(_events(job, listening), media_type="text/event-stream")
    return JSONResponse(_whole(job, await _unless_gone(job.request, listening)))


def _no_such_model(answers: Answers) -> Refused:
    known = ", ".join(answers.models)
    return Refused(f"no such model; there is: {known}", "model", status=404, code="model_not_found")


def refused_busy(problem: Any) -> Refused:
    return Refused(str(problem), status=429 if problem.mine else 503, code="busy", retry_after=2)


def sampling_of(body: Sampling, defaults: SamplingSettings) -> SamplingSettings:
    """The server's settings with what the request says.

    Raises:
        Refused: a value is out of range, or has no effect.
    """
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram", "seed")
        if (value := getattr(body, name)) is not None
    }
    if 0 < given.get("temperature", 0) < COLDEST:
        raise Refused(f"temperature has to be 0 or from {COLDEST} to {WARMEST}", "temperature")
    if body.longest is not None:
        if body.longest > defaults.max_new_tokens:
            raise Refused(f"at most {defaults.max_new_tokens} tokens are given here", "max_tokens")
        given["max_new_tokens"] = body.longest
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if given.get("temperature") == 0:  # the server's own draw is off; its bounds with it
        given = {"top_p": 1.0, "top_k": 0, **given}
    try:
        return dataclasses.replace(defaults, **given)
    except UsageError as problem:
        names = str(problem.message).replace("--", "").replace("top-p", "top_p").replace("top-k", "top_k")
        raise Refused(names, names.split()[0]) from None


async def _unless_gone(request: Request, listening: Listening) -> Answer:
    """The answer; who asked may go away meanwhile, and then nobody needs it."""
    answer = asyncio.ensure_future(listening.whole())
    gone = asyncio.ensure_future(request.receive())  # the body has been read: what comes is the end
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refused("the client went away", status=499)
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()
        listening.close()


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }


def _whole(job: _Job, answer: Answer) -> dict[str, Any]:
    if answer.error is not None:
        raise Refused(answer.error, status=503 if "time limit" in answer.error else 500, retry_after=2)
    said: dict[str, Any] = {"text": answer.text}
    if job.chat:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message |= {"content": answer.text or None, "tool_calls": job.called(answer.tool_calls)}
        said = {"message": message}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": _reason(answer)}
    return {**job.head(), "choices": [choice], "usage": _usage(answer)}


def _reason(answer: Answer) -> str:
    from medicalgpt_cli.engine.generation.wire import finish_reason

    return finish_reason(answer.finish_reason, answer.tool_calls)


async def _events(job: _Job, listening: Listening) -> AsyncIterator[str]:
    """Server-sent events, one JSON object each, ended by `[DONE]`."""
    include_usage = bool(job.body.stream_options and job.body.stream_options.include_usage)

    def event(said: dict[str, Any], reason: str | None = None) -> str:
        inner = {"delta": said} if job.chat else {"text": said.get("content", "")}
        choice = {"index": 0, **inner, "logprobs": None, "finish_reason": reason}
        extra = {"usage": None} if include_usage else {}
        return _data({**job.head(chunk=True), "choices": [choice], **extra})

    try:
        if job.chat:
            yield event({"role": "assistant", "content": ""})
        calls: list[ToolCall] = []
        async for deltas in listening.deltas(_SILENCE):
            if deltas is None:
                yield ": waiting\n\n"
            for delta in deltas or ():
                if delta.call is None:
                    yield event({_FIELDS[delta.kind]: delta.text})
                    continue
                calls.append(delta.call)
                yield event({"tool_calls": [{"index": len(calls) - 1, **job.called(calls)[-1]}]})
        answer = listening.answer
        if answer.error is not None:
            yield _data(error_body(503 if "time limit" in answer.error else 500, answer.error))
            return
        yield event({}, _reason(answer))
        if include_usage:
            yield _data({**job.head(chunk=True), "choices": [], "usage": _usage(answer)})
        yield "data: [DONE]\n\n"
    finally:
        listening.close()


def _data(value: dict[str, Any]) -> str:
    """An event. Characters that some clients take for the end of a line are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    text = _LINE_ENDS.sub(lambda found: json.dumps(found[0]).strip('"'), text)
    return f"data: {text}\n\n"
