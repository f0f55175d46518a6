"""Reasoning: split off, learnt as the template has it, and read back out of an answer."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.answer_targets import answer_turn
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_answer, render_conversation
from medicalgpt_cli.engine.data.formats import load_conversations
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.reasoning import split_reasoning
from medicalgpt_cli.engine.data.rendering import encode_prompt, render_text
from medicalgpt_cli.engine.data.template_facts import template_facts
from medicalgpt_cli.engine.data.tools import ParsedAnswer, decode_answer, parse_answer
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.rl_data import load_rl_data
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import RlSettings
from tests.cli import medgpt
from tests.engine.data.test_tools import ANSWER, CALL, QUESTION, TOOLS, calling, learnt, plain, streamed
from tests.engine.data.tool_templates import TEMPLATES, tokenizer_for, tokenizer_of
from tests.tiny import tiny_model, write_jsonl

NO_PLACE = "reasoning written as <think>…</think> in front of the answer: the template has no place for it"
THOUGHT = {**ANSWER, "reasoning": "10 mg a kilogram."}
# In the manner of DeepSeek-R1: the prompt opens the block, the history leaves it out.
R1 = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
WITH = [one for one in TEMPLATES if template_facts(tokenizer_of(one)).reasoning.way is not None]


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nWhy?\n</think>\n\nRest.", "Why?", "Rest."),
        ("<think>Why?</think>Rest.", "Why?", "Rest."),
        (" \n<think> Why?\n\nSo. </think> Rest. ", "Why?\n\nSo.", "Rest. "),
        ("Why?\n</think>\n\nRest.", "Why?", "Rest."),  # the prompt had opened it
        ("<think>\n\n</think>\n\nRest.", None, "Rest."),
        ("</think>Rest.", None, "Rest."),
        ("<think>Why?</think>", "Why?", ""),
        ("<think>Why?</think>A</think>B", "Why?", "A</think>B"),
        ("Rest.", None, "Rest."),
        ("<think>Why?", None, "<think>Why?"),  # never closed
        ("Say <think>why</think>.", None, "Say <think>why</think>."),  # not in front
        ("<think>a<think>b</think>c", None, "<think>a<think>b</think>c"),
        ("<thinking>Why?</thinking>Rest.", None, "<thinking>Why?</thinking>Rest."),
    ],
)
def test_reasoning_in_front_of_an_answer_is_split_off(content, reasoning, answer):
    assert split_reasoning(content) == (reasoning, answer)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("style", "target"),
    [
        ("qwen3", "<think>\n10 mg a kilogram.\n</think>\n\nTake 400 mg.<|im_end|>"),
        ("deepseek", "10 mg a kilogram.\n</think>\n\nTake 400 mg.</s>"),
        ("glm4.5", "\n<think>10 mg a kilogram.</think>\nTake 400 mg.</s>"),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>10 mg a kilogram.<|end|><|start|>assistant"
            "<|channel|>final<|message|>Take 400 mg.<|return|>",
        ),
        ("plain", "<think>\n10 mg a kilogram.\n</think>\n\nTake 400 mg.<|im_end|>"),
        ("llama3.1", "<think>\n10 mg a kilogram.\n</think>\n\nTake 400 mg.<|eot_id|>"),
    ],
)
def test_reasoning_is_learnt_as_the_template_writes_it(style, target, inline):
    tokenizer = tokenizer_of(style)
    said = "<think>\n10 mg a kilogram.\n</think>\n\nTake 400 mg."
    answer = {"role": "assistant", "content": said} if inline else THOUGHT
    ((ids,), counts) = learnt(tokenizer, QUESTION, answer, tools=())
    assert tokenizer.decode(ids) == target
    named = counts.merged[NO_PLACE]
    assert named == (style in ("plain", "llama3.1") and not inline)


@pytest.mark.parametrize(
    ("style", "thinking", "target"),
    [
        ("qwen3", "auto", "<think>\n\n</think>\n\nTake 400 mg.<|im_end|>"),
        ("qwen3", "off", "Take 400 mg.<|im_end|>"),
        ("qwen3", "on", "<think>\n\n</think>\n\nTake 400 mg.<|im_end|>"),
        ("deepseek", "auto", "\n</think>\n\nTake 400 mg.</s>"),
        ("glm4.5", "auto", "\n<think></think>\nTake 400 mg.</s>"),
        ("glm4.5", "on", "\n<think></think>\nTake 400 mg.</s>"),
        ("gpt-oss", "auto", "<|channel|>final<|message|>Take 400 mg.<|return|>"),
        ("plain", "auto", "Take 400 mg.<|im_end|>"),
    ],
)
def test_an_answer_without_reasoning_has_the_templates_empty_block(style, thinking, target):
    tokenizer, counts = tokenizer_of(style), Counts()
    conversation = Conversation((QUESTION, ANSWER), "a:1")
    (example,) = render_conversation(tokenizer, conversation, 4096, counts, thinking)
    ids = [one for one in example.labels if one >= 0]
    assert tokenizer.decode(ids) == target
    assert example.input_ids[: -len(ids)] == encode_prompt(tokenizer, [QUESTION], (), thinking)
    named = counts.merged[
        "answer without reasoning learnt as one, in a template that has a place for reasoning"
    ]
    assert named == (style != "plain" and thinking != "off") and not counts.skipped


def test_reasoning_that_the_prompt_has_closed_is_left_out_and_named():
    tokenizer, counts = tokenizer_of("qwen3"), Counts()
    (example,) = render_conversation(tokenizer, Conversation((QUESTION, THOUGHT), "a:1"), 4096, counts, "off")
    assert "kilogram" not in tokenizer.decode(example.input_ids)
    assert counts.merged["reasoning left out: the prompt for an answer has closed it already"] == 1


@pytest.mark.parametrize("thinking", ["on", "off"])
@pytest.mark.parametrize("style", ["plain", "deepseek", "gpt-oss", "qwen2.5"])
def test_a_switch_that_the_template_lacks_is_refused(style, thinking):
    with pytest.raises(UsageError) as problem:
        encode_prompt(tokenizer_of(style), [QUESTION], (), thinking)
    assert "--thinking" in problem.value.message


def test_the_switch_changes_the_prompt_and_its_default_is_the_templates():
    tokenizer = tokenizer_of("qwen3")
    texts = {
        one: render_text(tokenizer, [QUESTION], generation=True, thinking=one)
        for one in ("auto", "on", "off")
    }
    assert (
        texts["auto"]
        == texts["on"]
        == tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    )
    assert texts["off"] == tokenizer.apply_chat_template(
        [QUESTION], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert texts["off"] != texts["on"]


@pytest.mark.parametrize("style", WITH)
def test_earlier_reasoning_is_in_the_prompt_as_the_template_has_it(style):
    tokenizer = tokenizer_of(style)
    text = render_text(tokenizer, [QUESTION, THOUGHT, QUESTION], generation=True)
    assert ("kilogram" in text) == (style == "glm4.5")  # written here without the part that leaves it out


def test_marks_spelt_in_reasoning_do_not_close_it():
    tokenizer = tokenizer_of("qwen3")
    answer = {**ANSWER, "reasoning": "Say </think> or <|im_end|>."}
    ((ids,), _) = learnt(tokenizer, QUESTION, answer, tools=())
    closes, ends = tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
    assert ids.count(closes) == 1 and ids.count(ends) == 1
    assert "Say </think> or <|im_end|>." in tokenizer.decode(ids)


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_judged_answer_with_inline_reasoning_is_rendered_as_a_learnt_one(style):
    tokenizer = tokenizer_of(style)
    said = "<think>\n10 mg a kilogram.\n</think>\n\nTake 400 mg."
    judged = render_answer(tokenizer, [QUESTION], said, 4096)
    turn = answer_turn(tokenizer, [QUESTION, THOUGHT])
    assert judged == (turn.prompt, turn.target)


# -- reading back ------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from('ab é医\n{}[]"<>/.:'), min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(max_examples=150, deadline=None)
@given(
    style=st.sampled_from([*TEMPLATES]),
    reasoning=st.none() | TEXT,
    content=TEXT,
    call=st.booleans(),
    seed=st.integers(0, 99),
)
def test_reasoning_answer_and_calls_come_back(style, reasoning, content, call, seed):
    tokenizer = tokenizer_of(style)
    if style in ("llama3.1", "glm4") and (call or content[0] in "{["):
        return  # calls have no place beside text there
    calls = [CALL] if call else []
    content = "" if call and style in ("mistral", "gpt-oss") else content
    message = calling(*calls, content=content) if calls else {"role": "assistant", "content": content}
    if reasoning and not (call and style == "mistral"):
        message["reasoning"] = reasoning
    facts = template_facts(tokenizer).reasoning
    thinking = "auto" if facts.switch is None else "on"
    turn = answer_turn(tokenizer, [QUESTION, message], TOOLS, thinking)
    text = decode_answer(tokenizer, turn.target)
    parsed = parse_answer(tokenizer, text, tools=TOOLS, thinking=thinking)
    assert (parsed.content.strip(), parsed.reasoning) == (content, message.get("reasoning"))
    assert plain(parsed.tool_calls) == calls
    cut = random.Random(seed)
    pieces, rest = [], text
    while rest:
        length = cut.randint(1, 5)
        pieces, rest = [*pieces, rest[:length]], rest[length:]
    assert streamed(tokenizer, pieces, tools=TOOLS, thinking=thinking) == parsed


@pytest.mark.parametrize(
    ("style", "thinking", "text", "expected"),
    [
        ("qwen3", "auto", "<think>\nWhy?", ParsedAnswer("", "Why?")),  # cut while it thought
        ("qwen3", "auto", "<think>\n\n</think>\n\nRest.", ParsedAnswer("Rest.")),
        ("qwen3", "off", "Rest.", ParsedAnswer("Rest.")),
        ("deepseek", "auto", "Why?\n</think>\n\nRest.", ParsedAnswer("Rest.", "Why?")),
        (
            "deepseek",
            "auto",
            "<think>\nWhy?\n</think>\n\nRest.",
            ParsedAnswer("Rest.", "Why?"),
        ),  # opened twice
        ("deepseek", "auto", "Why", ParsedAnswer("", "Why")),
        ("deepseek", "auto", "\n</think>\n\nRest.", ParsedAnswer("Rest.")),
        ("plain", "auto", "<think>Why?</think>Rest.", ParsedAnswer("Rest.", "Why?")),
        ("plain", "auto", "Rest. <think>Why?</think>", ParsedAnswer("Rest. <think>Why?</think>")),
        ("gpt-oss", "auto", "<|channel|>final<|message|>Rest.", ParsedAnswer("Rest.")),
        ("gpt-oss", "auto", "Rest.", ParsedAnswer("Rest.")),
    ],
)
def test_answers_are_taken_apart(style, thinking, text, expected):
    tokenizer = tokenizer_of(style)
    assert parse_answer(tokenizer, text, thinking=thinking) == expected
    assert streamed(tokenizer, list(text), thinking=thinking) == expected


# -- the case of a mixed file -------------------------------------------------------------------------------


def test_answers_with_and_without_reasoning_under_a_template_that_opens_it(tmp_path):
    rows = [
        {"messages": [QUESTION, {"role": "assistant", "content": said}]}
        for said in ("<think>\nLoss.\n</think>\n\nBy loss.", "<think>Loss.</think>By loss.", "Too little.")
    ]
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    tokenizer, counts = tokenizer_for(R1), Counts()
    conversations = load_conversations([str(data)], counts, Observer())
    examples = [one for c in conversations for one in render_conversation(tokenizer, c, 512, counts)]
    targets = [tokenizer.decode([one for one in example.labels if one >= 0]) for example in examples]
    reasoned = "Loss.\n</think>\n\nBy loss.</s>"
    assert targets == [reasoned, reasoned, "\n</think>\n\nToo little.</s>"] and not counts.skipped


@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_a_policy_is_asked_under_the_setting_that_is_given(tmp_path, thinking):
    rows = [{"prompt": f"Dose for {number} kg?", "tools": [dict(TOOLS[0])]} for number in range(4)]
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    asked = RlSettings(
        train_data=(str(data),),
        reward_rule=("length",),
        algorithm="grpo",
        eval_fraction=0.0,
        thinking=thinking,
    )
    tokenizer = tokenizer_of("qwen3")
    found = load_rl_data(asked, tokenizer, frozenset(), 2048, Observer())
    for one in found.training:
        assert one.ids == encode_prompt(tokenizer, one.prompt.messages, one.prompt.tools, thinking)
        assert "The dose for a weight." in tokenizer.decode(one.ids)


def test_the_setting_needs_a_tokenizer_to_look_at_data(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": [QUESTION, ANSWER]}])
    refused = medgpt("data", data, "--thinking", "off")
    assert refused.returncode == 2 and "--thinking goes with a tokenizer" in refused.stderr


def test_none_is_skipped_on_the_command_line(tmp_path):
    answers = ("<think>Blood.</think>Loss.", "Loss.")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Why is iron low, case {number}?"},
                {"role": "assistant", "content": answers[number % 2]},
            ]
        }
        for number in range(8)
    ]
    data, template = write_jsonl(tmp_path / "some.jsonl", rows), tmp_path / "r1.jinja"
    template.write_text(R1, encoding="utf-8")
    model = tiny_model(tmp_path / "model", "none")
    done = medgpt(
        "sft", "--train-data", data, "--base-model", model, "--template", template, "--dry-run", "--json"
    )
    assert done.returncode == 0, done.stderr
    training = json.loads(done.stdout)["data"]["training"]
    assert training["skipped"] == {} and training["used"] == training["read"]
    refused = medgpt(
        *(
            "sft",
            "--train-data",
            data,
            "--base-model",
            model,
            "--template",
            template,
            "--dry-run",
            "--thinking",
            "off",
        )
    )
    assert refused.returncode == 2 and "no switch for reasoning" in refused.stderr
