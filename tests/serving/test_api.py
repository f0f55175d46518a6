"""The API as its clients see it: the official `openai` package, and plain HTTP."""

from __future__ import annotations

import json
import time

import pytest

from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.serving.running import running
from tests.tiny import tiny_model

QUESTIONS = ["What are the symptoms of diabetes?", "感冒发烧39度怎么办？", "Why?"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("api") / "tiny", seed=3)
    with running(folder, max_new_tokens=2000, system_prompt="You are a careful doctor.") as one:
        yield one


@pytest.fixture(scope="module")
def openai_client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(server, messages, **sampling):
    """The answer of the command line's backend."""
    reader = server.served.answers.reader
    backend = LocalBackend(reader.model, reader.tokenizer, SamplingSettings(**sampling))
    text = "".join(backend.stream(backend.prompt(messages)))
    return text, backend.last


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def post(server, path="/v1/chat/completions", **body):
    with server.client() as client:
        return client.post(path, json={"model": "tiny", **body})


def test_the_openai_client_gets_the_command_lines_answers(server, openai_client):
    assert [one.id for one in openai_client.models.list()] == ["tiny"]
    for question in QUESTIONS:
        messages = [{"role": "system", "content": "Be brief."}, *asked(question)]
        text, answer = expected(server, messages, max_new_tokens=20)
        made = openai_client.chat.completions.create(model="tiny", messages=messages, max_tokens=20)
        assert made.choices[0].message.content == text
        assert made.choices[0].finish_reason == answer.finish_reason
        assert made.usage.completion_tokens == answer.completion_tokens
        assert made.usage.prompt_tokens == answer.prompt_tokens
        stream = openai_client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_completion_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
        assert said == text and chunks[-1].usage.completion_tokens == answer.completion_tokens
        assert chunks[-2].choices[0].finish_reason == answer.finish_reason


def test_completions_continue_raw_text(server, openai_client):
    reader = server.served.answers.reader
    backend = LocalBackend(reader.model, reader.tokenizer, SamplingSettings(max_new_tokens=9))
    text = "".join(backend.stream(backend.raw_prompt("The symptoms of")))
    made = openai_client.completions.create(model="tiny", prompt="The symptoms of", max_tokens=9)
    assert made.choices[0].text == text
    stream = openai_client.completions.create(
        model="tiny", prompt=["The symptoms of"], max_tokens=9, stream=True
    )
    assert "".join(one.choices[0].text for one in stream) == text


def test_the_servers_system_prompt_stands_in_front_unless_there_is_one(server):
    system = {"role": "system", "content": "You are a careful doctor."}
    text, _ = expected(server, [system, *asked("Why?")], max_new_tokens=12)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]
    for messages in (asked("Why?"), parts, [{**system, "role": "developer"}, *asked("Why?")]):
        made = post(server, messages=messages, max_tokens=12).json()
        assert made["choices"][0]["message"]["content"] == text


def test_sampling_is_honoured(server):
    def said(**body):
        reply = post(server, messages=asked("What is fever?"), max_tokens=24, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    greedy, drawn = said(), said(temperature=1.2, seed=5)
    assert said(temperature=1.2, seed=5) == drawn != greedy
    assert said(temperature=1.2, seed=6) != drawn
    assert said(temperature=1.2, seed=5, top_k=1) == greedy == said(temperature=0)
    assert said(temperature=1.2, seed=5, top_p=0.01) == greedy
    assert said(repetition_penalty=5.0) != greedy
    stop = greedy[5:8]
    assert said(stop=stop) == greedy[: greedy.index(stop)] == said(stop=["\x00", stop])


def test_an_event_is_one_line_for_every_client():
    from medicalgpt_cli.serving.api import _data

    said = "a\x85b\u2028c\u2029d\x0be\x1cf中\r\n"
    [line, empty] = _data({"text": said}).splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": said} and empty == ""


REFUSED = [
    {"n": 2},
    {"presence_penalty": 0.5},
    {"frequency_penalty": -1},
    {"logprobs": True},
    {"logit_bias": {"5": 1}},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "web_search"}]},
    {"functions": [{"name": "f"}]},
    {"tool_choice": "required"},
    {"reasoning_effort": "high"},
    {"chat_template_kwargs": {"enable_thinking": True}},  # a template without a switch
    {"response_format": {"type": "json_object"}},
    {"user": "somebody"},
    {"temperature": 3},
    {"temperature": 1e-300},
    {"temperature": "hot"},
    {"top_p": 0},
    {"top_p": 0.5},  # without effect at the server's temperature of 0
    {"top_k": -1, "temperature": 1},
    {"seed": -1},
    {"max_tokens": 0},
    {"max_tokens": 2001},
    {"max_tokens": 3, "max_completion_tokens": 4},
    {"stop": ""},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stream_options": {"include_usage": True}},
    {"messages": []},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user"}]},
]


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: json.dumps(body)[:60])
def test_what_is_not_honoured_is_refused_by_name(server, body):
    reply = post(server, **{"messages": asked("CANARY-fever"), **body})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error" and next(iter(body)).split("_")[0] in str(error)
    assert "CANARY" not in reply.text  # nothing that was sent is quoted


def test_neutral_values_are_taken(server):
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "tools": []}
    neutral |= {"logit_bias": {}, "response_format": {"type": "text"}, "stream": False, "stop": None}
    neutral |= {"tool_choice": "auto", "parallel_tool_calls": True, "functions": [], "function_call": "none"}
    neutral |= {"top_logprobs": 0, "modalities": ["text"], "metadata": {}}
    assert post(server, messages=asked("Why?"), max_tokens=2, **neutral).status_code == 200


def test_the_servers_own_message_is_taken_back(server, openai_client):
    """As clients send it: the object itself, everything that it dumps, and what a stream was put together to."""
    create = openai_client.chat.completions.create
    first = create(model="tiny", messages=asked("What is anaemia?"), max_tokens=5).choices[0].message
    with openai_client.chat.completions.stream(
        model="tiny", messages=asked("What is anaemia?"), max_tokens=5
    ) as stream:
        assert list(stream)
        streamed = stream.current_completion_snapshot.choices[0].message
    assert first.content == streamed.content
    plain = [*asked("What is anaemia?"), {"role": "assistant", "content": first.content}, *asked("more")]
    right = create(model="tiny", messages=plain, max_tokens=5).choices[0].message.content
    neutral = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None, "name": None}
    neutral |= {"tool_calls": [], "reasoning_content": None, "parsed": None, "refusal": None}
    for back in (
        first,
        streamed,
        first.model_dump(),
        streamed.model_dump(),
        first.to_dict(),
        {**first.model_dump(), **neutral},
        {**first.model_dump(), "refusal": "", "reasoning_content": ""},
    ):
        messages = [*asked("What is anaemia?"), back, *asked("more")]
        for _ in range(2):  # and so on, for several turns
            answer = create(model="tiny", messages=messages, max_tokens=5).choices[0].message
            if len(messages) == 3:
                assert answer.content == right
            messages = [*messages, answer, *asked("more")]


def test_a_field_that_is_null_is_one_that_was_not_sent(server):
    from medicalgpt_cli.serving.api_fields import ChatRequest, CompletionRequest

    plain = post(server, messages=asked("Why?"), max_tokens=4).json()["choices"][0]["message"]["content"]
    unsaid = {
        name: None for name in ChatRequest.model_fields if name not in ("model", "messages", "max_tokens")
    }
    unsaid |= dict.fromkeys(("user", "prediction", "web_search_options", "safety_identifier"))
    message = {**asked("Why?")[0], "name": None, "tool_calls": None, "anything": None}
    reply = post(server, messages=[message], max_tokens=4, **unsaid)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == plain
    unsaid = {name: None for name in CompletionRequest.model_fields if name not in ("model", "prompt")}
    reply = post(server, "/v1/completions", prompt="Why?", **{**unsaid, "max_tokens": 4, "suffix": None})
    assert reply.status_code == 200, reply.text
    parts = [{"role": "user", "content": [{"type": "text", "text": "Why?", "cache_control": None}]}]
    options = {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}}
    assert post(server, messages=parts, max_tokens=2, **options).status_code == 200
    for missing in ({"messages": None}, {"messages": [{"role": "user", "content": None}]}):
        assert post(server, **missing).status_code == 400


def test_each_model_can_be_asked_about(server, openai_client):
    import openai

    assert openai_client.models.retrieve("tiny") == openai_client.models.list().data[0]
    for name in ("gpt-4", "owner/name", "../health", "tiny/x", "a?b", "模型"):
        with pytest.raises(openai.NotFoundError, match="no such model; there is: tiny"):
            openai_client.models.retrieve(name)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]},
         ["messages.0.content", "part 2 of type image_url", "parts of type text"]),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, ["part 1 of type input_audio"]),
        ({"content": [{"type": "CANARY", "text": "a"}]}, ["part 1 is not read"]),
        ({"content": ["CANARY"]}, ["part 1 is not read"]),
        ({"content": 5}, ["messages.0.content: Input should be a valid string"]),
        ({"content": "a", "name": "CANARY"}, ["messages.0.name: chat templates know no names"]),
        ({"content": "a", "role": "tool"}, ["messages.0: tool_call_id is missing"]),
        ({"content": "a", "role": "CANARY"}, ["messages.0.role: the roles are system, developer, user"]),
        ({"content": "a", "role": "assistant", "tool_calls": [{"id": "CANARY"}]},
         ["messages.0.tool_calls.0.function: Field required"]),
        ({"content": "a", "reasoning_content": "CANARY"}, ["reasoning_content: it belongs to the role assistant"]),
        ({"content": "a", "tool_call_id": "CANARY"}, ["tool_call_id: it belongs to the role tool"]),
        ({"content": "a", "role": "assistant", "function_call": {"name": "CANARY"}}, ["use tools and tool_calls"]),
        ({"content": "a", "role": "assistant", "refusal": "CANARY"}, ["a refusal is not read"]),
        ({"content": "a", "role": "assistant", "audio": {"id": "CANARY"}}, ["no audio"]),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_part_that_is_refused_is_named_in_plain_words(server, message, words):
    reply = post(server, messages=[{"role": "user", **message}], max_tokens=1)
    error = reply.json()["error"]
    assert reply.status_code == 400 and "CANARY" not in reply.text
    assert all(one in error["message"] for one in words), error


def test_other_mistakes(server):
    reply = post(server, messages=asked("Why?"), model="gpt-4")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    reply = post(server, messages=asked("very " * 3000))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    with server.client() as client:
        for broken in (b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"model": NaN}'):
            reply = client.post(
                "/v1/chat/completions", content=broken, headers={"content-type": "application/json"}
            )
            assert reply.status_code == 400 and "error" in reply.json()


def counters(server) -> dict[str, float]:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("this did not come true")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(server, stream):
    before = counters(server)["medgpt_requests_cancelled_total"]
    body = {
        "model": "tiny",
        "messages": asked("Check with your doctor"),
        "max_tokens": 2000,
        "stream": stream,
    }
    with server.client() as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                next(reply.iter_text())
        else:
            with pytest.raises(Exception, match="timed out"):
                client.post("/v1/chat/completions", json=body, timeout=0.3)
    until(lambda: server.scheduler.load == {"waiting": 0, "running": 0})
    assert counters(server)["medgpt_requests_cancelled_total"] == before + 1


def test_a_full_queue_says_when_to_come_again(tmp_path):
    folder = tiny_model(tmp_path / "tiny", seed=3)
    limits = {"max_batch": 1, "max_queue": 1, "max_client_requests": 3, "max_new_tokens": 2000}
    with running(folder, **limits) as server, server.client() as client:
        body = {"model": "tiny", "messages": asked("Why?"), "stream": True}
        with (
            client.stream("POST", "/v1/chat/completions", json=body) as first,
            client.stream("POST", "/v1/chat/completions", json=body) as second,
        ):
            assert first.status_code == second.status_code == 200
            reply = client.post("/v1/chat/completions", json={**body, "stream": False})
            assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
            assert client.get("/health").json() == {"status": "ok"}


def test_a_field_that_is_no_name_is_not_repeated(server):
    for field, said in (("max_tokenz", "max_tokenz"), ("Zorblatt has a fever", "?")):
        reply = post(server, messages=asked("Why?"), **{field: 1})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == f"{said}: this field is not supported"
