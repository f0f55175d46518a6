"""What stands inside tools and calls is checked as all text is: what cannot be rendered is refused by its line."""

from __future__ import annotations

import json

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.engine.data.rendering import render_text
from medicalgpt_cli.engine.data.tools import parse_answer
from medicalgpt_cli.errors import DataError
from tests.engine.data.tool_templates import tokenizer_of

QUESTION = {"role": "user", "content": "What dose?"}


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": "\ud800"}, "half a character"),
        ({"\ud800": 1}, "half a character"),
        ({"a": [{"b": "x\udfff"}]}, "half a character"),
        ({"a": [float("inf")]}, "not finite"),
        (nested(70), "more than 64 deep"),
    ],
    ids=("text", "key", "inside", "infinite", "deep"),
)
def test_a_value_that_cannot_be_rendered_is_refused(value, words):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": value}}],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": value}}]
    for record in ({"messages": [QUESTION, call]}, {"messages": [QUESTION], "tools": tools}):
        with pytest.raises(DataError, match=words) as refused:
            read_record(Row("a.jsonl", 7, record), Counts())
        assert "a.jsonl:7" in refused.value.message


def test_what_can_be_rendered_is_taken():
    value = {"a": [1, 2.5, None, True, "🙂", {"b": {}}], **nested(50)}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": value}}],
    }
    row = Row("a", 1, {"messages": [QUESTION, call], "tools": [{"name": "f", "parameters": value}]})
    record = read_record(row, Counts())
    assert record.messages[1]["tool_calls"][0]["arguments"] == value == record.tools[0]["parameters"]
    assert json.dumps(value)


@pytest.mark.parametrize("style", ["qwen3", "llama3.1", "mistral", "glm4", "hermes"])
@pytest.mark.parametrize(
    "arguments",
    ['{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a":' * 70 + "1" + "}" * 70],
    ids=("surrogate", "nan", "infinite", "twice", "deep"),
)
def test_a_call_that_a_model_writes_like_that_is_text(style, arguments):
    """It could be written to no file and sent to no client, or would say something else than the model did."""
    tokenizer = tokenizer_of(style)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"Zk7": 1}}]}
    whole = render_text(tokenizer, [QUESTION, call], generation=False)
    said = whole.removeprefix(render_text(tokenizer, [QUESTION], generation=True))
    said = said.replace('{"Zk7": 1}', arguments)
    assert arguments in said
    for tools in (None, [{"name": "f"}]):
        parsed = parse_answer(tokenizer, said, tools=tools)
        assert not parsed.tool_calls and arguments in parsed.content
