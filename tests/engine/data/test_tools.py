"""Calls of tools: rendered as the template does, read back as they were, whole and piece by piece."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data import answer_windows
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, render_answer, render_conversation
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.preferences import prompt_hash
from medicalgpt_cli.engine.data.rendering import encode_prompt, encode_rendered, render_text, stop_token_ids
from medicalgpt_cli.engine.data.template_facts import TEMPLATE_ERRORS, template_facts
from medicalgpt_cli.engine.data.tools import AnswerStream, Delta, ParsedAnswer, decode_answer, parse_answer
from medicalgpt_cli.errors import UsageError
from tests.engine.data.tool_templates import TEMPLATES, tokenizer_for, tokenizer_of

TOOLS = (
    {
        "name": "dose",
        "description": "The dose for a weight.",
        "parameters": {
            "type": "object",
            "properties": {"kg": {"type": "number"}, "drug": {"type": "string"}},
        },
    },
    {"name": "查询", "description": "", "parameters": {}},
)
QUESTION = {"role": "user", "content": "What dose for 40 kg?"}
CALL = {"name": "dose", "arguments": {"kg": 40, "drug": 'a "b"\n{c}'}}
OTHER = {"name": "查询", "arguments": {}}
RESULT = {"role": "tool", "content": "400 mg"}
ANSWER = {"role": "assistant", "content": "Take 400 mg."}
FIVE = ("qwen2.5", "qwen3", "llama3.1", "mistral", "glm4", "hermes")  # Qwen's two count as one style
ALL = tuple(TEMPLATES)
ONE_CALL = ("llama3.1", "gpt-oss")
NO_TEXT_BESIDE = ("llama3.1", "mistral", "gpt-oss")


def calling(*calls, content="", **more):
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def learnt(tokenizer, *messages, tools=TOOLS) -> tuple[list[list[int]], Counts]:
    """The stretches with a loss."""
    counts = Counts()
    examples = render_conversation(tokenizer, Conversation(tuple(messages), "a:1", tools=tools), 4096, counts)
    found = []
    for example in examples:
        for has_loss, group in groupby(example.labels, lambda label: label != IGNORED):
            found += [list(group)] if has_loss else []
    return found, counts


def plain(calls) -> list[dict]:
    return [{"name": one["name"], "arguments": one["arguments"]} for one in calls]


def streamed(tokenizer, pieces, **more) -> ParsedAnswer:
    stream = AnswerStream(tokenizer, **more)
    deltas = [delta for piece in pieces for delta in stream.feed(piece)] + stream.finish()
    said = {
        kind: "".join(one.text for one in deltas if one.kind == kind) for kind in ("content", "reasoning")
    }
    calls = tuple(one.call for one in deltas if one.call)
    return ParsedAnswer(said["content"], said["reasoning"] or None, calls, stream.malformed)


# -- rendering ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ALL)
def test_tools_stand_in_the_prompt_calls_are_learnt_and_results_are_context(style):
    tokenizer = tokenizer_of(style)
    found, counts = learnt(tokenizer, QUESTION, calling(CALL), RESULT, ANSWER)
    assert not counts.skipped
    prompt = tokenizer.decode(encode_prompt(tokenizer, [QUESTION], TOOLS))
    assert "The dose for a weight." in prompt and "查询" in prompt
    texts = [tokenizer.decode(ids) for ids in found]
    assert len(texts) == 2
    assert "dose" in texts[0] and "400 mg" not in texts[0] and "400 mg" in texts[1]
    behind = tokenizer.decode(encode_prompt(tokenizer, [QUESTION, calling(CALL), RESULT], TOOLS))
    assert behind.count("400 mg") == 1
    plain_form = "tools written in a plain form: the template has no place for them"
    assert counts.merged[plain_form] == (style in ("plain", "deepseek"))


@pytest.mark.parametrize("style", [one for one in ALL if one not in ("plain", "glm4", "deepseek")])
def test_the_rendering_is_the_librarys(style):
    """GLM-4 and DeepSeek take calls in other shapes than the library's documentation; their texts are below."""
    tokenizer = tokenizer_of(style)
    call = {"id": "abc123XYZ", "type": "function", "function": {"name": "dose", "arguments": {"kg": 40}}}
    theirs = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "400 mg", "tool_call_id": "abc123XYZ", "name": "dose"},
    ]
    ours = [QUESTION, calling({"name": "dose", "arguments": {"kg": 40}, "id": "abc123XYZ"}), RESULT]
    expected = tokenizer.apply_chat_template(
        theirs,
        tools=[{"type": "function", "function": dict(one)} for one in TOOLS],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert encode_prompt(tokenizer, ours, TOOLS) == expected


@pytest.mark.parametrize(
    ("style", "target"),
    [
        ("glm4", 'dose\n{"kg": 40}<|observation|>'),
        (
            "deepseek",
            '\n</think>\n\n<|calls|><|call|>function<|sep|>dose\n```json\n{"kg": 40}\n```<|/call|><|/calls|></s>',
        ),
        ("gpt-oss", ' to=functions.dose<|channel|>commentary json<|message|>{"kg": 40}<|call|>'),
        (
            "glm4.5",
            "\n<think></think>\n<tool_call>dose\n<arg_key>kg</arg_key>\n<arg_value>40</arg_value>\n</tool_call>"
            "<|observation|>",
        ),
        ("plain", '<tool_call>{"name": "dose", "arguments": {"kg": 40}}</tool_call><|im_end|>'),
    ],
)
def test_what_a_model_learns_to_write(style, target):
    tokenizer = tokenizer_of(style)
    ((ids, *_), _) = learnt(
        tokenizer, QUESTION, calling({"name": "dose", "arguments": {"kg": 40}}), RESULT, ANSWER
    )
    assert tokenizer.decode(ids) == target
    assert ids[-1] in stop_token_ids(tokenizer)


def test_the_plain_form_keeps_turns_alternating():
    tokenizer = tokenizer_of("plain")
    messages = [
        QUESTION,
        calling(CALL, OTHER, content="Let me see."),
        RESULT,
        {"role": "tool", "content": "none"},
    ]
    text = render_text(tokenizer, messages, generation=True)
    lines = [f"<tool_call>{json.dumps(one, ensure_ascii=False)}</tool_call>" for one in (CALL, OTHER)]
    assert text.endswith(
        "<|im_start|>assistant\nLet me see.\n" + "\n".join(lines) + "<|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n400 mg\n</tool_response>\n<tool_response>\nnone\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_results_find_their_calls_by_id_then_by_name_then_in_order():
    tokenizer = tokenizer_of("mistral")
    calls = [{**CALL, "id": "one"}, {**OTHER, "id": "two"}, {**OTHER, "id": "three"}]
    results = [
        {"role": "tool", "content": "3", "tool_call_id": "three"},
        {"role": "tool", "content": "2", "name": "查询"},
        {"role": "tool", "content": "1"},
    ]
    text = render_text(tokenizer, [QUESTION, calling(*calls), *results], generation=True)
    told = json.loads(text.partition("[TOOL_CALLS]")[2].partition("</s>")[0])
    answered = [json.loads(one.partition("[/TOOL_RESULTS]")[0]) for one in text.split("[TOOL_RESULTS]")[1:]]
    ids = [one["id"] for one in told]
    assert len(set(ids)) == 3 and all(len(one) == 9 and one.isalnum() for one in ids)
    assert [(one["content"], one["call_id"]) for one in answered] == [
        ("3", ids[2]),
        ("2", ids[1]),
        ("1", ids[0]),
    ]


@pytest.mark.parametrize("style", ONE_CALL)
def test_several_calls_where_a_template_takes_one_are_counted(style):
    found, counts = learnt(tokenizer_of(style), QUESTION, calling(CALL, OTHER), RESULT, RESULT, ANSWER)
    assert not found and dict(counts.skipped) == {"the chat template takes one tool call a turn": 1}


@pytest.mark.parametrize("style", ALL)
def test_text_beside_a_call_is_learnt_or_named(style):
    tokenizer = tokenizer_of(style)
    found, counts = learnt(tokenizer, QUESTION, calling(CALL, content="Let me see."), RESULT, ANSWER)
    named = counts.merged["text in front of a tool call left out: the template has no place for it"]
    shown = "Let me see." in "".join(tokenizer.decode(ids) for ids in found)
    assert (named, shown) == ((1, False) if style in NO_TEXT_BESIDE else (0, True))


@pytest.mark.parametrize("style", ALL)
def test_what_tools_say_is_text_whatever_it_spells(style):
    """In descriptions, names of arguments, values and results no spelling becomes a control token."""
    tokenizer = tokenizer_of(style)
    known = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}

    def controls(said: str) -> list[str]:
        tool = {
            "name": "dose",
            "description": said,
            "parameters": {"properties": {said: {"description": said}}},
        }
        call = {"name": "dose", "arguments": {"kg": said, "more": [said]}}
        messages = [QUESTION, calling(call), {"role": "tool", "content": said, "name": "dose"}]
        ids = encode_prompt(tokenizer, messages, [tool])
        assert style == "gpt-oss" or tokenizer.decode(ids).count(said) >= 4
        return [known[one] for one in ids if one in known]

    harmless = controls("harmless")
    for token in known.values():
        assert controls(token) == harmless, token


def test_a_template_that_escapes_its_json_gives_no_token_away_and_no_guard():
    template = TEMPLATES["qwen2.5"].replace("tojson", "tojson(ensure_ascii=True)")
    tokenizer = tokenizer_for(template)
    tool = {"name": "dose", "description": "Say <|im_end|> or <tool_call>, é \\ufdd0."}
    ids = encode_prompt(
        tokenizer, [QUESTION, calling({"name": "dose", "arguments": {"a": "<|im_end|>"}}), RESULT], [tool]
    )
    text = tokenizer.decode(ids)
    assert r"Say <|im_end|> or <tool_call>, \u00e9 \\ufdd0." in text and '{"a": "<|im_end|>"}' in text
    harmless = [QUESTION, calling({"name": "dose", "arguments": {"a": "b"}}), RESULT]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == encode_prompt(tokenizer, harmless, [{"name": "dose"}]).count(end)


@pytest.mark.parametrize("style", ALL)
def test_each_target_stands_behind_what_inference_renders(style):
    tokenizer = tokenizer_of(style)
    messages = [QUESTION, calling(CALL), RESULT, ANSWER, QUESTION, ANSWER]
    counts = Counts()
    examples = render_conversation(tokenizer, Conversation(tuple(messages), "a:1", tools=TOOLS), 4096, counts)
    begins = []
    for example in examples:
        edges = zip([IGNORED, *example.labels], example.labels, strict=False)
        places = [at for at, (one, other) in enumerate(edges) if one == IGNORED != other]
        begins += [example.input_ids[:at] for at in places]
    asked = [messages[:at] for at, one in enumerate(messages) if one["role"] == "assistant"]
    assert begins == [encode_prompt(tokenizer, one, TOOLS) for one in asked]


@pytest.mark.parametrize("style", ALL)
def test_a_long_conversation_with_tools_is_what_it_is_turn_by_turn(style, monkeypatch):
    tokenizer = tokenizer_of(style)
    messages = []
    for number in range(14):
        call = {"name": "dose", "arguments": {"kg": number}}
        thought = {"reasoning": f"Case {number}."} if number % 3 else {}
        messages += [QUESTION, calling(call), RESULT, {**ANSWER, **thought}]
    windows = learnt(tokenizer, *messages)
    monkeypatch.setattr(answer_windows, "_FEW", 1000)
    whole = learnt(tokenizer, *messages)
    assert windows[0] == whole[0] and windows[1].merged == whole[1].merged and len(whole[0]) >= 20


def test_calls_that_cannot_be_read_back_are_named():
    found, counts = learnt(tokenizer_of("qwen2.5"), QUESTION, calling({"name": "the dose", "arguments": {}}))
    assert len(found) == 1 and [reason for reason in counts.merged if "a name is more than" in reason]
    template = TEMPLATES["qwen2.5"].replace("c.arguments | tojson", "c.arguments | items | list | string")
    tokenizer = tokenizer_for(template)
    found, counts = learnt(tokenizer, QUESTION, calling(CALL))
    assert len(found) == 1 and [reason for reason in counts.merged if "is unknown" in reason]
    text = decode_answer(tokenizer, found[0])
    assert "<tool_call>" in text and parse_answer(tokenizer, text, tools=TOOLS) == ParsedAnswer(text.rstrip())


def test_prompts_that_differ_in_a_call_are_two():
    one, other = (
        [QUESTION, calling({"name": "dose", "arguments": {"kg": kg}}), RESULT, QUESTION] for kg in (4, 5)
    )
    assert prompt_hash(one) != prompt_hash(other) and prompt_hash(one) == prompt_hash(
        [dict(turn) for turn in one]
    )


def test_an_answer_with_a_call_is_judged_as_it_is_learnt():
    tokenizer = tokenizer_of("qwen2.5")
    judged = render_answer(tokenizer, [QUESTION], calling(CALL), 4096, TOOLS)
    ((ids,), _) = learnt(tokenizer, QUESTION, calling(CALL))
    assert judged == (encode_prompt(tokenizer, [QUESTION], TOOLS), ids)


def test_a_template_that_leaves_out_plain_text_is_refused():
    """Made for images: it writes parts of a message, and nothing where that is a text."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(UsageError) as problem:
        learnt(tokenizer_for(template), QUESTION, ANSWER, tools=())
    assert "leaves out what is said" in problem.value.message


# -- reading back ------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"\A[A-Za-z_\u4e00-\u4e10][\w.-]{0,12}\Z")
CALLS = st.fixed_dictionaries(
    {"name": NAMES, "arguments": st.dictionaries(st.text(max_size=8), VALUES, max_size=4)}
)


def answer_text(tokenizer, message, tools) -> str:
    """What a model that has learnt `message` writes: its target, decoded."""
    found, counts = learnt(tokenizer, QUESTION, message, tools=tools)
    assert len(found) == 1, counts.skipped
    return decode_answer(tokenizer, found[0])


@settings(max_examples=150, deadline=None)
@given(
    style=st.sampled_from([*FIVE, "deepseek", "gpt-oss", "plain"]),
    calls=st.lists(CALLS, min_size=1, max_size=3),
    content=st.sampled_from(["", "Let me see.", '说明：{"a": 1}\n再看。']),
    data=st.data(),
)
def test_calls_come_back_as_they_were(style, calls, content, data):
    tokenizer = tokenizer_of(style)
    calls = calls[:1] if style in ONE_CALL else calls
    content = "" if style in NO_TEXT_BESIDE else content
    tools = [{"name": name} for name in {one["name"] for one in calls}]
    text = answer_text(tokenizer, calling(*calls, content=content), tools)
    parsed = parse_answer(tokenizer, text, tools=tools, thinking="off" if style == "qwen3" else "auto")
    assert (parsed.content, plain(parsed.tool_calls), parsed.malformed) == (content, calls, False)
    assert parsed == parse_answer(tokenizer, text)  # without the list of tools it is the same
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[one:other] for one, other in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert streamed(tokenizer, pieces, tools=tools) == parsed
    assert streamed(tokenizer, list(text), tools=tools) == parsed


@settings(max_examples=40, deadline=None)
@given(
    arguments=st.dictionaries(
        st.from_regex(r"\A[a-z_]{1,8}\Z"),
        st.integers()
        | st.booleans()
        | st.lists(st.integers())
        | st.from_regex(r"\A[A-Za-z高血压 \n\"{}]*\Z"),
        max_size=4,
    )
)
def test_calls_in_pairs_of_marks_come_back_with_the_types_of_their_schema(arguments):
    tokenizer = tokenizer_of("glm4.5")
    properties = {key: {"type": "string"} for key, value in arguments.items() if isinstance(value, str)}
    tools = [{"name": "dose", "parameters": {"type": "object", "properties": properties}}]
    text = answer_text(tokenizer, calling({"name": "dose", "arguments": arguments}), tools)
    parsed = parse_answer(tokenizer, text, tools=tools, thinking="off")
    assert plain(parsed.tool_calls) == [{"name": "dose", "arguments": arguments}]
    assert streamed(tokenizer, list(text), tools=tools, thinking="off") == parsed


@settings(max_examples=250, deadline=None)
@given(style=st.sampled_from(ALL), data=st.data())
def test_any_text_is_read_the_same_in_pieces_and_nothing_of_it_is_lost(style, data):
    tokenizer = tokenizer_of(style)
    form = template_facts(tokenizer).tools.form
    reasoning = template_facts(tokenizer).reasoning
    marks = [
        one for one in (form.begin, form.open, form.middle, form.close, form.end, *form.pair) if one.strip()
    ]
    marks += [reasoning.open, reasoning.close, template_facts(tokenizer).header.text]
    bits = [
        '{"name": "dose", "arguments": {"kg": 4}}',
        '{"kg": 4}',
        "dose",
        "\n",
        " ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "Word",
        "医",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from([*marks, *bits]) | st.text(max_size=3), max_size=10)))
    thinking = data.draw(st.sampled_from(["auto", "on", "off"]))
    parsed = parse_answer(tokenizer, text, tools=TOOLS, thinking=thinking)
    for pieces in (list(text), [text[at : at + 3] for at in range(0, len(text), 3)]):
        assert streamed(tokenizer, pieces, tools=TOOLS, thinking=thinking) == parsed
    if not parsed.tool_calls:
        said = f"{parsed.reasoning or ''}{parsed.content}"
        for mark in marks:
            text, said = text.replace(mark.strip(), ""), said.replace(mark.strip(), "")
        assert [one for one in text if one.isalnum()] == [one for one in said if one.isalnum()]


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("qwen2.5", '<tool_call>\n{"name": "dose", "arguments": {"kg": }}\n</tool_call>'),  # no JSON
        ("qwen2.5", '<tool_call>\n{"name": "dose", "arguments": {"kg": NaN}}\n</tool_call>'),
        ("qwen2.5", '<tool_call>\n{"name": "dose", "arguments": [4]}\n</tool_call>'),
        ("qwen2.5", '<tool_call>\n{"name": "else", "arguments": {}}\n</tool_call>'),  # not offered
        ("qwen2.5", '<tool_call>\n{"name": "dose", "arguments": {"kg": 4}'),  # cut
        ("qwen2.5", '<tool_call>\n{"name": "dose", "arguments": {"kg": 4}} and so on'),
        ("qwen2.5", "<tool_call>\n" + "[" * 20_000 + "]" * 20_000 + "\n</tool_call>"),
        ("mistral", '[TOOL_CALLS] [{"name": "dose", "arguments": {"kg": 4}}, {"name": 7}]'),
        ("llama3.1", '{"name": "else", "parameters": {"kg": 4}}'),
        ("deepseek", "<|calls|><|call|>function<|sep|>dose\n```json\n{4}\n```<|/call|><|/calls|>"),
    ],
)
def test_what_is_no_call_stays_text_and_is_said(style, text):
    parsed = parse_answer(tokenizer_of(style), text, tools=TOOLS, thinking="off")
    if template_facts(tokenizer_of(style)).reasoning.opened:
        parsed = parse_answer(tokenizer_of(style), "</think>" + text, tools=TOOLS)
    assert parsed == ParsedAnswer(text, None, (), malformed=True)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("qwen2.5", "A call stands between <tool_call> and </tool_call>."),
        ("llama3.1", '{"diagnosis": "flu"}'),
        ("llama3.1", 'An example: {"name": "dose", "parameters": {"kg": 4}}'),
        ("glm4", "dose\nis a word"),
        ("glm4", "Take this:\n{}"),
        ("mistral", "See [TOOL_CALLS] there."),
    ],
)
def test_prose_that_mentions_a_mark_is_prose(style, text):
    assert parse_answer(tokenizer_of(style), text, tools=TOOLS) == ParsedAnswer(text)


@pytest.mark.parametrize("style", ALL)
def test_without_tools_offered_nothing_is_a_call(style):
    tokenizer = tokenizer_of(style)
    text = answer_text(tokenizer, calling(CALL), TOOLS)
    assert parse_answer(tokenizer, text, tools=TOOLS).tool_calls
    assert parse_answer(tokenizer, text, tools=()).tool_calls == ()


def test_a_call_is_given_out_as_soon_as_it_is_whole():
    stream = AnswerStream(tokenizer_of("qwen2.5"), tools=TOOLS)
    call = '<tool_call>\n{"name": "dose", "arguments": {"kg": 4}}\n</tool_call>'
    assert stream.feed("Let me ") == [Delta("content", "Let me")]
    assert stream.feed("see.\n<tool") == [Delta("content", " see.")]
    assert stream.feed(call[5:-3]) == []
    assert stream.feed(call[-3:]) == [Delta("tool_call", call={"name": "dose", "arguments": {"kg": 4}})]
    assert stream.finish() == []


def test_marks_that_are_special_tokens_survive_decoding():
    tokenizer = tokenizer_of("mistral")
    ids = encode_rendered(tokenizer, '[TOOL_CALLS] [{"name": "dose", "arguments": {}}]</s>')
    assert decode_answer(tokenizer, ids) == '[TOOL_CALLS] [{"name": "dose", "arguments": {}}]'
    assert "[TOOL_CALLS]" not in tokenizer.decode(ids, skip_special_tokens=True)


# -- published templates -----------------------------------------------------------------------------------


def published(given: str | None) -> list[Path]:
    if given:
        return sorted(Path(given).glob("**/*.jinja"))
    trl = pytest.importorskip("trl")
    return sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


@pytest.mark.slow
def test_published_templates(request):
    """Those of `--medgpt-templates DIR`, or else of an installed package: the library's rendering, and the round trip.

    Some have calls in a form that cannot be found out, which has to show: what is read back is right or nothing.
    """
    files = [
        one
        for one in published(request.config.getoption("--medgpt-templates"))
        if "_training" not in one.name
    ]
    assert files
    read, unread = [], []
    for file in files:
        tokenizer = tokenizer_for(file.read_text(encoding="utf-8"))
        facts = template_facts(tokenizer)
        try:
            tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)
        except TEMPLATE_ERRORS:
            continue  # made for images
        if not facts.writes:
            continue
        theirs = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
        assert encode_prompt(tokenizer, [QUESTION]) == theirs, file.name
        if facts.tools.way == "object" and facts.tools.lists:
            wrapped = {
                "id": "abc123XYZ",
                "type": "function",
                "function": {"name": "dose", "arguments": {"kg": 40}},
            }
            expected = tokenizer.apply_chat_template(
                [QUESTION, {"role": "assistant", "content": "", "tool_calls": [wrapped]}],
                tools=[{"type": "function", "function": dict(one)} for one in TOOLS], tokenize=False,
            )  # fmt: skip
            call = {"name": "dose", "arguments": {"kg": 40}, "id": "abc123XYZ"}
            assert (
                render_text(tokenizer, [QUESTION, calling(call)], generation=False, tools=TOOLS) == expected
            )
        found, counts = learnt(tokenizer, QUESTION, calling(CALL))
        assert len(found) == 1, (file.name, counts.skipped)
        parsed = parse_answer(tokenizer, decode_answer(tokenizer, found[0]), tools=TOOLS, thinking="off")
        if facts.reasoning.switch is None:
            parsed = parse_answer(tokenizer, decode_answer(tokenizer, found[0]), tools=TOOLS)
        assert plain(parsed.tool_calls) == ([CALL] if facts.tools.form else []), file.name
        (read if facts.tools.form else unread).append(file.stem)
    print(f"read back: {', '.join(read)}\nnot: {', '.join(unread)}")
