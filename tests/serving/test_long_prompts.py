"""A prompt that is far too long costs little, and nobody waits behind one that takes long to read."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from medicalgpt_cli.engine.data import control_tokens
from tests.serving.running import running
from tests.serving.test_api import asked, post, until
from tests.tiny import tiny_model

LONG = "Please tell me more about fever. " * 30_000  # 1 MB


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("long") / "tiny", seed=3)
    with running(folder, max_client_requests=5) as one:
        yield one


@pytest.fixture
def read(monkeypatch):
    """What is given to the tokenizer, and a gate behind which it does its work on long pieces."""
    pieces, gate, whole = [], threading.Event(), control_tokens.encode_piece
    gate.set()

    def noted(tokenizer, text):
        pieces.append(len(text))
        if len(text) > 8000:
            assert gate.wait(60)
        return whole(tokenizer, text)

    monkeypatch.setattr(control_tokens, "encode_piece", noted)
    yield pieces, gate
    gate.set()


def test_what_is_too_long_costs_what_the_context_costs(server, read):
    pieces, _ = read
    context = server.served.answers.reader.context
    reply = post(server, messages=asked(LONG))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert f"the context {context}" in reply.json()["error"]["message"]
    assert post(server, "/v1/completions", prompt=LONG).status_code == 400
    assert sum(pieces) < 100_000  # of two million characters
    assert server.scheduler.counters.requests == 0


def test_a_short_question_waits_behind_no_long_one(server, read):
    _, gate = read
    gate.clear()
    reading = server.served.answers._reading
    with ThreadPoolExecutor(5) as pool:
        long = [pool.submit(post, server, messages=asked(LONG)) for _ in range(4)]
        until(lambda: reading.total() == 4)
        assert post(server, messages=asked("Why?"), max_tokens=2).status_code == 200
        assert server.client().get("/health").status_code == 200
        # one client's prompts that are being read count as its requests
        long.append(pool.submit(post, server, messages=asked(LONG)))
        until(lambda: reading.total() == 5)
        assert post(server, messages=asked("Why?"), max_tokens=2).status_code == 429
        assert not any(one.done() for one in long)
        gate.set()
        assert {one.result().status_code for one in long} == {400}
    assert not reading


def test_the_page_leaves_a_long_history_out_and_reads_little_of_it(server, read):
    pieces, _ = read
    reader = server.served.answers.reader
    history = [{"role": role, "content": LONG[:5000]} for _ in range(100) for role in ("user", "assistant")]
    prompt, dropped = reader.fitted_prompt([*history, *asked("Why?")], 8)
    assert len(prompt) < reader.context and dropped == 200
    assert sum(pieces) < 400_000  # of a million characters, in eight renderings
