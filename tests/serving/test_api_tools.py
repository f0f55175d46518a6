"""Tools and reasoning over the API: what the template says to the model, and what the model says back."""

from __future__ import annotations

import json

import pytest

from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.data.tool_messages import as_functions
from tests.serving.running import running
from tests.talker import ANSWER, CALL, PLAIN, QUESTION, RESULT, THOUGHT, TOOLS, talker

OTHERS = ({"name": "weather", "description": "", "parameters": {}},)
FUNCTIONS = as_functions(TOOLS)
ARGUMENTS = CALL["tool_calls"][0]["arguments"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(talker(tmp_path_factory.mktemp("tools") / "tiny", "qwen3"), max_new_tokens=200) as one:
        yield one


@pytest.fixture(scope="module")
def create(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    return lambda **body: client.chat.completions.create(model="tiny", **body)


def post(server, **body):
    with server.client() as client:
        return client.post("/v1/chat/completions", json={"model": "tiny", "messages": [QUESTION], **body})


def put_together(chunks) -> dict:
    """A message out of the deltas of a stream, as clients do it."""
    message: dict = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    for choice in (one.choices[0] for one in chunks if one.choices):
        delta = choice.delta.to_dict()
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or ():
            assert call.pop("index") == len(message["tool_calls"])  # a call comes as a whole here
            message["tool_calls"].append(call)
        message["finish_reason"] = choice.finish_reason
    return message


def test_a_loop_of_tools_with_the_openai_client(create):
    """Ask, call, give the result, get the answer; the client's own object goes back as it is."""
    first = create(
        messages=[QUESTION], tools=FUNCTIONS, tool_choice="auto", parallel_tool_calls=True
    ).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None
    [call] = first.message.tool_calls
    assert (call.type, call.function.name) == ("function", "dose")
    assert json.loads(call.function.arguments) == ARGUMENTS and "扑热息痛" in call.function.arguments
    assert first.message.reasoning_content == CALL["reasoning"]
    for back in (first.message, first.message.model_dump(), first.message.to_dict()):
        result = {"role": "tool", "tool_call_id": call.id, "content": RESULT["content"]}
        last = create(messages=[QUESTION, back, result], tools=FUNCTIONS).choices[0]
        assert (last.message.content, last.finish_reason) == (ANSWER["content"], "stop")
        assert last.message.reasoning_content == ANSWER["reasoning"] and last.message.tool_calls is None
    again = create(messages=[QUESTION], tools=FUNCTIONS).choices[0].message.tool_calls
    assert again[0].id != call.id  # each answer's calls have ids of their own


def test_a_loop_of_tools_streamed(create):
    asked = {"tools": FUNCTIONS, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(messages=[QUESTION], **asked))
    said = put_together(chunks)
    assert said.pop("finish_reason") == "tool_calls" and chunks[-1].usage.completion_tokens > 10
    assert said["reasoning_content"] == CALL["reasoning"] and said["content"] == ""
    [call] = said["tool_calls"]
    assert call["function"]["name"] == "dose" and json.loads(call["function"]["arguments"]) == ARGUMENTS
    thoughts = [
        one for one in chunks if one.choices and getattr(one.choices[0].delta, "reasoning_content", None)
    ]
    assert len(thoughts) > 3  # they come as they are thought
    result = {
        "role": "tool",
        "tool_call_id": call["id"],
        "content": [{"type": "text", "text": RESULT["content"]}],
    }
    last = put_together(create(messages=[QUESTION, said, result], **asked))
    assert (last["content"], last["reasoning_content"]) == (ANSWER["content"], ANSWER["reasoning"])
    assert last["finish_reason"] == "stop" and not last["tool_calls"]


def test_the_openai_clients_own_helper_puts_the_stream_together(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with client.chat.completions.stream(model="tiny", messages=[QUESTION], tools=FUNCTIONS) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.name == "dose"
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": RESULT["content"]}
    reply = client.chat.completions.create(
        model="tiny", messages=[QUESTION, message, result], tools=FUNCTIONS
    )
    assert reply.choices[0].message.content == ANSWER["content"]


def test_the_prompt_is_the_one_that_training_rendered(server):
    tokenizer = server.served.answers.reader.tokenizer
    call = {"id": "a", "type": "function", "function": {"name": "dose", "arguments": json.dumps(ARGUMENTS)}}
    earlier = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {**RESULT, "tool_call_id": "a"}
    for field in ({"reasoning_content": CALL["reasoning"]}, {"reasoning": CALL["reasoning"]}):
        used = post(server, messages=[QUESTION, {**earlier, **field}, result], tools=FUNCTIONS, max_tokens=1)
        ids = encode_prompt(tokenizer, [QUESTION, CALL, RESULT], TOOLS)
        assert used.json()["usage"]["prompt_tokens"] == len(ids)
    plain = post(server, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert plain == len(encode_prompt(tokenizer, [QUESTION]))
    none = post(server, tools=FUNCTIONS, tool_choice="none", max_tokens=1).json()["usage"]["prompt_tokens"]
    assert none == plain  # what must not be called is not offered


def test_reasoning_is_a_field_of_its_own_and_is_turned_off(server):
    said = post(server, messages=THOUGHT[:1]).json()["choices"][0]["message"]
    assert said["content"] == THOUGHT[1]["content"] and said["reasoning_content"] == THOUGHT[1]["reasoning"]
    for name in ("enable_thinking", "thinking"):
        said = post(server, messages=PLAIN[:1], chat_template_kwargs={name: False}).json()["choices"][0][
            "message"
        ]
        assert said["content"] == PLAIN[1]["content"] and "reasoning_content" not in said
    on, auto = (
        post(server, messages=THOUGHT[:1], max_tokens=1, **more).json()["usage"]["prompt_tokens"]
        for more in ({"chat_template_kwargs": {"enable_thinking": True}}, {})
    )
    assert on == auto


def test_an_answer_cut_in_its_thoughts_has_no_text(server):
    choice = post(server, messages=THOUGHT[:1], max_tokens=4).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
    assert THOUGHT[1]["reasoning"].startswith(choice["message"]["reasoning_content"])


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


def tool(**more) -> dict:
    return {"type": "function", "function": {"name": "CANARY", **more}}


def called(arguments: str) -> dict:
    return {"role": "assistant", "tool_calls": [{**MADE, "function": {"name": "f", "arguments": arguments}}]}


MADE = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice: a call can be left to the model (auto)"),
        ({"tool_choice": {"type": "function", "function": {"name": "CANARY"}}}, "not forced"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls: how many tools are called"),
        ({"tools": [tool(strict=True)]}, "cannot be promised"),
        ({"tools": [tool(parameters=nested(40))]}, "more than 64 deep"),
        ({"tools": [tool(description="x" * 70_000)]}, "a tool may have 65536 characters"),
        ({"tools": [tool(name=f"f{number}") for number in range(129)]}, "tools: List should have at most 128"),
        ({"tools": [tool(), tool()]}, "two functions have one name"),
        ({"tools": [tool(name="")]}, "tools.0.function.name"),
        ({"tools": [tool(CANARY_is_no_field=1)]}, "tools.0.function"),
        ({"messages": [QUESTION, {"role": "tool", "tool_call_id": "CANARY", "content": "x"}]}, "no call before it"),
        ({"messages": [QUESTION, called("CANARY")]}, "the text of a JSON object is expected: not valid JSON"),
        ({"messages": [QUESTION, called(json.dumps(nested(40)))]}, "more than 64 deep"),
        ({"messages": [QUESTION, called('{"a": 1, "a": 2}')]}, "stood there before"),
        ({"messages": [QUESTION, called('{"a": NaN}')]}, "NaN"),
        ({"messages": [QUESTION, called('{"a": 1e999}')]}, "not finite"),
        ({"messages": [QUESTION, called('{"a": "\\ud800"}')]}, "half a character"),
        ({"messages": [QUESTION, called("[]")]}, "the text of a JSON object is expected"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "a", "reasoning": "CANARY",
                                  "reasoning_content": "b"}]}, "contradict each other"),
        ({"messages": [{**QUESTION, "tool_calls": [MADE]}]}, "tool_calls: it belongs to the role assistant"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "content is missing"),
        ({"chat_template_kwargs": {"enable_thinking": True, "thinking": False}}, "contradict each other"),
        ({"chat_template_kwargs": {"add_date": True}}, "this field is not supported"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_is_not_taken_is_refused_in_plain_words(server, body, words):
    reply = post(server, **{"tools": FUNCTIONS, **body})
    assert reply.status_code == 400, reply.text
    assert words in reply.json()["error"]["message"] and "CANARY" not in reply.text.replace(
        "CANARY_is_no_field", ""
    )
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("parameters", [{"a": "\ud800"}, {"\ud800": 1}, {"a": [{"b": "\udfff"}]}])
def test_half_a_character_is_refused(server, parameters):
    body = json.dumps({"model": "tiny", "messages": [QUESTION], "tools": [tool(parameters=parameters)]})
    with server.client() as client:
        headers = {"content-type": "application/json"}
        reply = client.post("/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == 400 and "half a character" in reply.json()["error"]["message"]


def test_deep_json_is_refused_and_the_server_goes_on(server):
    deep = '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": ' + "[" * 50_000
    with server.client() as client:
        reply = client.post(
            "/v1/chat/completions", content=deep, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 400
    assert post(server, max_tokens=1).status_code == 200


def test_a_call_of_a_tool_that_was_not_offered_stays_text(tmp_path, server):
    """A model that calls by heart: with no tools, or with others, what it wrote is the text of its answer."""
    by_heart = (Conversation((QUESTION, CALL), "a:1"), Conversation((QUESTION, CALL), "a:2", tools=OTHERS))
    with running(talker(tmp_path / "tiny", "hermes", by_heart), max_new_tokens=200) as one:
        for tools in ([], as_functions(OTHERS)):
            choice = post(one, tools=tools).json()["choices"][0]
            assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
            assert (
                "<tool_call>" in choice["message"]["content"] and "扑热息痛" in choice["message"]["content"]
            )


def test_another_server_in_front_passes_both_on(server):
    remote = {"use_cpu": False, "dtype": "auto", "endpoint": server.url, "max_new_tokens": 200}
    with running(None, base_model=None, **remote) as front:
        ours = post(front, tools=FUNCTIONS)
        assert ours.status_code == 200, ours.text
        ours = ours.json()["choices"][0]
        theirs = post(server, tools=FUNCTIONS).json()["choices"][0]
        for one in (ours, theirs):
            one["message"]["tool_calls"][0].pop("id")
        assert ours == theirs
        said = post(front, messages=PLAIN[:1], chat_template_kwargs={"enable_thinking": False}).json()
        assert said["choices"][0]["message"]["content"] == PLAIN[1]["content"]
        with front.client() as client:
            body = {"model": "tiny", "messages": [QUESTION], "tools": FUNCTIONS, "stream": True}
            streamed = client.post("/v1/chat/completions", json=body).text
        assert '"tool_calls"' in streamed and '"reasoning_content"' in streamed and "[DONE]" in streamed
