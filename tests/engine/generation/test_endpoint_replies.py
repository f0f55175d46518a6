"""What other servers reply, in their own ways: reasoning under two names, calls in pieces, calls that are none."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medicalgpt_cli.engine.generation.answer_reader import content_of
from medicalgpt_cli.engine.generation.decoding import Answer
from medicalgpt_cli.engine.generation.endpoint import EndpointBackend
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.talker import CALL, QUESTION, RESULT, TOOLS

DOSE = {"name": "dose", "arguments": '{"kg": 40}'}


def delta(**said) -> dict:
    return {"choices": [{"index": 0, "delta": said, "finish_reason": None}]}


def piece(index: int, **more) -> dict:
    return delta(tool_calls=[{"index": index, **more}])


STREAM = [
    delta(role="assistant", content=""),
    delta(reasoning="Look "),
    delta(reasoning="it up."),
    delta(content="I look."),
    piece(0, id="c1", type="function", function={"name": "dose", "arguments": ""}),
    piece(0, function={"arguments": '{"kg"'}),
    piece(1, id="c2", type="function", function={"name": "dose", "arguments": "{}"}),
    piece(0, function={"arguments": ": 40}"}),
    piece(2, id="c3", type="function", function={"name": "dose", "arguments": '{"kg": '}),
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}},
]
WHOLE = {
    "content": "I look.", "reasoning_content": "Look it up.",
    "tool_calls": [{"id": "c1", "type": "function", "function": DOSE}, {"type": "function", "function": {"name": 5}}],
}  # fmt: skip


BODIES: list[dict] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        BODIES.append(body)
        self.send_response(200)
        if body.get("stream"):
            lines = "".join(f"data: {json.dumps(one)}\n\n" for one in STREAM) + "data: [DONE]\n\n"
        else:
            lines = json.dumps({"choices": [{"message": WHOLE, "finish_reason": "tool_calls"}]})
        self.send_header("content-length", str(len(lines.encode())))
        self.end_headers()
        self.wfile.write(lines.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def backend():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield EndpointBackend(
        f"http://127.0.0.1:{server.server_port}/v1", "m", None, SamplingSettings(thinking="off"), parallel=1
    )
    server.shutdown()


def test_a_stream_is_put_together_and_nothing_of_it_is_lost(backend):
    deltas = [one for piece in backend.deltas(backend.prompt([QUESTION], TOOLS)) for one in piece]
    broken = json.dumps({"function": {"name": "dose", "arguments": '{"kg": '}, "id": "c3"})
    calls = (
        {"name": "dose", "arguments": {"kg": 40}, "id": "c1"},
        {"name": "dose", "arguments": {}, "id": "c2"},
    )
    assert backend.last.reasoning == "Look it up." and backend.last.tool_calls == calls
    assert content_of(deltas) == backend.last.text == "I look." + broken  # a call that is none is text
    assert (backend.last.prompt_tokens, backend.last.completion_tokens) == (7, 9)


def test_a_whole_reply_and_what_is_sent(backend):
    found: list[Answer] = []
    history = [QUESTION, CALL, RESULT]
    backend.answer_batch([backend.prompt(history, TOOLS)], lambda _, answer: found.append(answer))
    [answer] = found
    assert answer.reasoning == "Look it up."
    assert answer.tool_calls == ({"name": "dose", "arguments": {"kg": 40}, "id": "c1"},)
    assert answer.text.startswith("I look.{") and '"name": 5' in answer.text
    sent = BODIES[-1]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    assert sent["tools"] == [{"type": "function", "function": TOOLS[0]}]
    called, result = sent["messages"][1:]
    assert called["reasoning_content"] == CALL["reasoning"] and called["content"] is None
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == CALL["tool_calls"][0]["arguments"]
    assert result["tool_call_id"] == called["tool_calls"][0]["id"] and result["role"] == "tool"
