"""Conversations of many turns: the same examples as the plain way gives, in time that grows with their length."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data import control_tokens, rendering
from medicalgpt_cli.engine.data.answer_windows import first_that_fits
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, render_answer, render_conversation, uncut_lengths
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.errors import UsageError
from tests.engine.data import turn_by_turn
from tests.engine.data.turn_by_turn import render_turn_by_turn
from tests.tiny import STYLES, tiny_tokenizer

# Numbers its rounds: what stands in front of a question hangs on how many there were.
_ROUNDS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + (loop.index0 // 2) | string + '] ' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Has no control tokens, and cuts away all but the last answers' reasoning.
_PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Writes what the answers behind the last question think, and an empty block behind the generation prompt.
_THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% set text = m['content'] %}{% if '</think>' in text and loop.index0 < ns.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_OWN = {"rounds": _ROUNDS, "plain": _PLAIN, "thinks": _THINKS}
_ALL = (*STYLES[:-1], *_OWN)


@functools.cache
def tokenizer_of(style: str):
    tokenizer = tiny_tokenizer(style if style in STYLES else "qwen3")
    tokenizer.chat_template = _OWN.get(style, tokenizer.chat_template)
    return tokenizer


def conversation(turns: int, words: int = 8, system: bool = False) -> Conversation:
    spoken = [
        {"role": ("user", "assistant")[i % 2], "content": f"turn {i} " + "fever " * words}
        for i in range(turns)
    ]
    before = [{"role": "system", "content": "You are a doctor."}] if system else []
    return Conversation((*before, *spoken), "a.jsonl:1")


_text = st.one_of(
    st.text("abc de\n感冒<>|", min_size=1, max_size=30),
    st.sampled_from(["<think>\nWhy?\n</think>\n\nSo.", "<think>x</think>y", "<|im_end|>", " ", "x" * 300]),
)


@st.composite
def conversations(draw) -> Conversation:
    """Of up to 20 answers, now and then with a greeting, a system message, and what a tool said."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(_text)})
    if draw(st.integers(0, 9)) == 0:
        messages.append({"role": "assistant", "content": draw(_text)})
    tools = draw(st.integers(0, 4)) == 0
    for _ in range(draw(st.one_of(st.integers(1, 5), st.integers(13, 20)))):
        messages.append({"role": "user", "content": draw(_text)})
        messages.append({"role": "assistant", "content": draw(_text)})
        if tools and draw(st.integers(0, 3)) == 0:
            messages.append({"role": "tool", "content": draw(_text)})
            messages.append({"role": "assistant", "content": draw(_text)})
    return Conversation(tuple(messages), "a.jsonl:1", "an id")


def _said(counts: Counts) -> dict:
    return {**counts.as_dict(), "places": dict(counts.places)}


@pytest.mark.parametrize("style", _ALL)
@settings(max_examples=12, deadline=None)
@given(conversations(), st.one_of(st.integers(5, 120), st.integers(100, 1000)))
def test_examples_are_those_of_the_plain_way(style, one, max_length):
    tokenizer = tokenizer_of(style)
    counts, expected_counts = Counts(read=1), Counts(read=1)
    found = render_conversation(tokenizer, one, max_length, counts)
    expected = render_turn_by_turn(tokenizer, copy.deepcopy(one), max_length, expected_counts)
    assert found == expected
    assert _said(counts) == _said(expected_counts)
    uncut = render_turn_by_turn(tokenizer, one, 10**9, Counts())
    assert uncut_lengths(tokenizer, one) == [len(example.input_ids) for example in uncut]


@pytest.mark.parametrize("style", STYLES[:-1])
@settings(max_examples=12, deadline=None)
@given(conversations(), st.integers(1, 900))
def test_a_history_is_shortened_as_in_the_plain_way(style, one, budget):
    messages = one.messages[:-1]
    try:
        expected = turn_by_turn.fit_history(tokenizer_of(style), messages, budget)
    except UsageError:  # this template refuses a tool's turn, or a greeting
        return
    assert rendering.fit_history(tokenizer_of(style), messages, budget) == expected


def test_the_first_that_fits():
    for count in range(40):
        for first in range(count + 1):
            asked = Counter()

            def fits(at, first=first, asked=asked):
                asked[at] += 1
                return at >= first

            assert first_that_fits(count, fits) == first
            assert all(0 <= at < count for at in asked) and (not asked or max(asked.values()) == 1)


@pytest.fixture
def characters(monkeypatch):
    """How many characters were tokenised, and how many the template has written."""
    seen = Counter()
    encode, render = control_tokens.encode_piece, rendering.check_rendered

    def count_encoded(tokenizer, text):
        seen["encoded"] += len(text)
        return encode(tokenizer, text)

    def count_rendered(text, size):
        seen["rendered"] += len(text)
        return render(text, size)

    monkeypatch.setattr(control_tokens, "encode_piece", count_encoded)
    monkeypatch.setattr(rendering, "check_rendered", count_rendered)
    return seen


@pytest.mark.parametrize("max_length", [256, 10**9])
@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "gemma", "qwen3", "plain", "thinks"])
def test_twice_the_turns_take_twice_the_work(style, max_length, characters):
    """Counted in characters; the uncut examples of a template that rewrites are by themselves of quadratic size."""
    tokenizer, work = tokenizer_of(style), {}
    for turns in (120, 240, 480):
        characters.clear()
        if max_length == 10**9:
            uncut_lengths(tokenizer, conversation(turns))
        else:
            assert render_conversation(tokenizer, conversation(turns), max_length, Counts())
        work[turns] = dict(characters)
    for kind in ("encoded", "rendered"):
        assert work[240][kind] <= 2.3 * work[120][kind]
        assert work[480][kind] <= 2.3 * work[240][kind]


@pytest.mark.parametrize("style", ["chatml", "qwen3"])
def test_a_chat_and_a_pair_look_no_further_back_than_they_have_to(style, characters):
    """All that grows with the history of a chat is one rendering of it, and none of its tokenising."""
    tokenizer, work = tokenizer_of(style), {}
    for turns in (400, 800):
        messages = conversation(turns).messages
        characters.clear()
        kept, dropped = rendering.fit_history(tokenizer, messages[:-1], 200)
        assert len(kept) + dropped == turns - 1 and kept
        assert render_answer(tokenizer, messages[-6:-1], "Rest.", 10**6)
        work[turns] = dict(characters)
    assert work[800] == pytest.approx(work[400], rel=0.1)


# -- weights -----------------------------------------------------------------------------------------------


def weighted(*weights: float | None) -> Conversation:
    messages = []
    for number, weight in enumerate(weights):
        messages.append({"role": "user", "content": f"question {number}"})
        answer = {"role": "assistant", "content": f"answer {number}"}
        messages.append(answer if weight is None else {**answer, "weight": weight})
    return Conversation(tuple(messages), "a.jsonl:1")


@pytest.mark.parametrize("style", ["chatml", "qwen3"])
def test_an_answer_of_weight_0_is_context(style):
    tokenizer, counts = tokenizer_of(style), Counts(read=1)
    found = render_conversation(tokenizer, weighted(0, 1.0, None, 0), 4096, counts)
    every = render_conversation(tokenizer, weighted(1, 1, 1), 4096, Counts())
    if style == "chatml":
        assert found[0].input_ids == every[0].input_ids
        learnt = tokenizer.decode([one for one in found[0].labels if one != IGNORED])
    else:
        assert [one.input_ids for one in found] == [one.input_ids for one in every[1:]]
        learnt = "".join(tokenizer.decode([x for x in one.labels if x != IGNORED]) for one in found)
    assert "answer 0" not in learnt and "answer 1" in learnt and "answer 2" in learnt
    assert all(one.weights is None for one in found)
    assert counts.merged["turns with weight 0 are context"] == 1
    assert counts.merged["turns behind the last answer to learn left out"] == 1


def test_other_weights_stand_at_the_tokens_of_their_answers():
    tokenizer = tokenizer_of("chatml")
    (one,) = render_conversation(tokenizer, weighted(0.5, 2, None, 0), 4096, Counts())
    learnt = {}
    for label, weight in zip(one.labels, one.weights, strict=True):
        if label != IGNORED:
            learnt.setdefault(weight, []).append(label)
    said = {weight: tokenizer.decode(ids) for weight, ids in learnt.items()}
    assert said == {0.5: "answer 0<|im_end|>", 2: "answer 1<|im_end|>", 1: "answer 2<|im_end|>"}


def test_weights_survive_truncation():
    tokenizer = tokenizer_of("chatml")
    (whole,) = render_conversation(tokenizer, weighted(0.5, 2, 3), 4096, Counts())
    (cut,) = render_conversation(tokenizer, weighted(0.5, 2, 3), len(whole.input_ids) - 1, Counts())
    learnt = {w for label, w in zip(cut.labels, cut.weights, strict=True) if label != IGNORED}
    assert learnt == {2, 3}
    (newest,) = render_conversation(tokenizer, weighted(3), 4096, Counts())
    room = len(newest.input_ids) - 1
    (short,) = render_conversation(tokenizer, weighted(3), room, Counts())
    assert short.weights == newest.weights[:room] and short.labels == newest.labels[:room]


def test_a_conversation_of_weight_0_is_skipped_and_counted():
    counts = Counts(read=1)
    assert render_conversation(tokenizer_of("chatml"), weighted(0, 0), 4096, counts) == []
    assert dict(counts.skipped) == {"no answer to learn from: all have weight 0": 1}
