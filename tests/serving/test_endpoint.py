"""`--endpoint`: infer, chat and serve-demo against a server, which is our own here."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medicalgpt_cli.engine.generation.conversation import Conversation
from medicalgpt_cli.engine.generation.endpoint import KEY_VARIABLE, EndpointBackend
from medicalgpt_cli.engine.generation.endpoint_scheduler import EndpointScheduler
from medicalgpt_cli.engine.generation.infer import run_infer
from medicalgpt_cli.engine.generation.scheduler import Limits
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import EnvironmentFailure, UsageError
from medicalgpt_cli.settings.groups import SamplingSettings
from medicalgpt_cli.settings.stages import ChatSettings, InferSettings, ServeSettings
from tests.serving.running import free_port, running
from tests.serving.test_api import QUESTIONS, asked
from tests.tiny import text, tiny_model

SECRET = "a-secret-of-ana-1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("endpoint") / "tiny", seed=3)


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, max_new_tokens=1000) as one:
        yield one


def infer(tmp_path, name: str, **settings) -> list[dict]:
    questions = tmp_path / "q.txt"
    questions.write_text("\n".join([*QUESTIONS, "very " * 3000]) + "\n", encoding="utf-8")
    out = tmp_path / f"{name}.jsonl"
    chosen = {"data_file": str(questions), "predictions_file": str(out), "max_new_tokens": 16, **settings}
    run_infer(InferSettings(**chosen), Observer())
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_infer_gives_the_same_answers_as_here(server, folder, tmp_path):
    for options in ({}, {"with_prompt": False}, {"stop": ("e",)}, {"system_prompt": "Be brief."}):
        here = infer(tmp_path, f"here{len(str(options))}", base_model=str(folder), use_cpu=True, **options)
        there = infer(tmp_path, f"there{len(str(options))}", endpoint=server.url, **options)
        assert here[:-1] == there[:-1]  # tokens and reasons, too
        assert [row["finish_reason"] for row in (here[-1], there[-1])] == ["error", "error"]


def test_a_draw_is_repeated_by_its_seed(server, tmp_path):
    drawn = {"endpoint": server.url, "temperature": 1.2, "top_p": 0.9, "top_k": 40}
    one, same, other = (infer(tmp_path, f"d{i}", seed=s, **drawn) for i, s in enumerate((5, 5, 6)))
    assert one == same != other


def test_chat_streams_and_remembers(server, folder):
    shared = {"max_new_tokens": 16, "system_prompt": "Be brief."}
    there = Conversation.open(ChatSettings(endpoint=f"{server.url}/v1/", **shared), Observer())
    here = Conversation.open(ChatSettings(base_model=str(folder), use_cpu=True, **shared), Observer())
    for question in QUESTIONS:
        assert text(there.ask(question)) == text(here.ask(question))
        assert there.last.completion_tokens == here.last.completion_tokens
    assert text(there.retry()) == text(here.retry())
    stopped = there.ask("Why?")
    next(stopped)
    stopped.close()
    with pytest.raises(UsageError, match="refuses the request"):
        text(there.ask("very " * 3000))


def test_serve_demo_in_front_of_another_server(server, folder):
    with running(None, base_model=None, use_cpu=False, dtype="auto", endpoint=server.url) as front:
        body = {"model": "tiny", "messages": asked("Why?"), "max_tokens": 9}
        with front.client() as client, server.client() as direct:
            ours = client.post("/v1/chat/completions", json=body).json()
            theirs = direct.post("/v1/chat/completions", json=body).json()
            assert ours["choices"] == theirs["choices"] and ours["usage"] == theirs["usage"]
            streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text
            assert "[DONE]" in streamed
            refused = client.post("/v1/chat/completions", json={**body, "repetition_penalty": 2.0})
            assert refused.status_code == 400


def test_time_counts_while_a_request_waits(server):
    backend = EndpointBackend.open(ChatSettings(endpoint=server.url), Observer())
    running = EndpointScheduler(backend, Limits(seconds=0))
    over: queue.Queue = queue.Queue()
    prompt = backend.prompt(asked("Why?"))
    running.submit(prompt, SamplingSettings(max_new_tokens=3), lambda piece, answer: over.put(answer))
    assert "time limit" in over.get(timeout=30).error
    running.close()


def test_keys(folder, tmp_path, monkeypatch):
    with running(folder, users={"ana": SECRET}) as server:
        with pytest.raises(EnvironmentFailure, match="refuses the key") as refused:
            EndpointBackend.open(ChatSettings(endpoint=server.url), Observer())
        assert refused.value.exit_code == 3
        key = tmp_path / "key"
        key.write_text(SECRET + "\n")
        EndpointBackend.open(ChatSettings(endpoint=server.url, endpoint_key_file=key), Observer())
        monkeypatch.setitem(os.environ, KEY_VARIABLE, SECRET)
        EndpointBackend.open(ChatSettings(endpoint=server.url), Observer())


def test_what_is_wrong_is_said(server, tmp_path):
    for settings, word in (
        ({"endpoint": "localhost:8000"}, "not an address"),
        ({"endpoint_model": "x"}, "goes with --endpoint"),
        ({"endpoint": server.url, "base_model": "x"}, "--base-model has no effect"),
        ({"endpoint": server.url, "use_cpu": True}, "--use-cpu has no effect"),
        ({"endpoint": server.url, "repetition_penalty": 1.1}, "--repetition-penalty has no effect"),
        ({"endpoint": server.url, "endpoint_key_file": tmp_path / "none"}, "No such file"),
        ({"endpoint": server.url, "endpoint_model": "gpt"}, "not this model"),
    ):
        with pytest.raises(UsageError, match=word):
            text(Conversation.open(ChatSettings(**settings), Observer()).ask("Why?"))
    with pytest.raises(UsageError, match="not this model"):
        infer(tmp_path, "no", endpoint=server.url, endpoint_model="gpt")
    with pytest.raises(EnvironmentFailure, match="cannot be reached"):
        Conversation.open(ChatSettings(endpoint=f"http://127.0.0.1:{free_port()}"), Observer())
    assert ServeSettings(endpoint=server.url).endpoint


class _Endless(BaseHTTPRequestHandler):
    """Says which model it has, and then never stops."""

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        streams = json.loads(self.rfile.read(length)).get("stream")
        part = b"data: " + b"x" * 2**20 if streams else b" " * 2**20
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side hangs up
            while True:
                self.wfile.write(part)

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_never_stops_is_left():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as endless:
        threading.Thread(target=endless.serve_forever, daemon=True).start()
        settings = ChatSettings(endpoint=f"http://127.0.0.1:{endless.server_port}/v1", max_new_tokens=4)
        talk = Conversation.open(settings, Observer())
        with pytest.raises(EnvironmentFailure, match="does not end within 64 MiB"):
            text(talk.ask("What helps?"))
        with pytest.raises(EnvironmentFailure, match="does not end within 64 MiB"):
            talk.backend.answer_batch([talk.backend.prompt(asked("What helps?"))], lambda *_: None)
        endless.shutdown()
