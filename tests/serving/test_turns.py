"""Thoughts on the page: a folded block that counts as no message, kept in what is downloaded."""

from __future__ import annotations

import asyncio
import json

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.serving.page import _kept
from medicalgpt_cli.serving.turns import Turn, drawn, exact, is_thought, place_of, plain
from tests.serving.running import running
from tests.talker import ANSWER, PLAIN, QUESTION, THOUGHT, talker

MARKED = {"role": "assistant", "content": "Not closed? </think> Yes."}
SAID = [*THOUGHT, PLAIN[0], MARKED, *PLAIN, QUESTION, {**ANSWER, "content": " Take 400 mg.\n"}]


def test_a_conversation_comes_back_as_it_was():
    shown = drawn(SAID)
    assert [is_thought(one) for one in shown] == [False, True, *[False] * 5, False, True, False]
    assert plain(shown) == SAID
    trimmed = [{**one, "content": [{"type": "text", "text": one["content"].strip()}]} for one in shown]
    assert exact(trimmed, _kept(SAID)) == SAID  # word for word, whatever the chatbot trims
    assert plain(trimmed)[0] == SAID[0] and plain(trimmed)[-1]["reasoning"] == ANSWER["reasoning"]
    assert [place_of(shown, index) for index in (0, 2, 3, 5, 7, 9)] == [0, 1, 2, 4, 6, 7]
    record = read_record(Row("kept", 1, json.loads(_kept(SAID))), Counts())
    assert list(record.messages) == SAID


def test_thoughts_without_an_answer_yet():
    running_ = drawn([QUESTION, {"role": "assistant", "content": "", "reasoning": "Hm"}], running=True)
    assert len(running_) == 2 and running_[1]["metadata"]["status"] == "pending"
    assert plain(running_) == [QUESTION]  # stopped there, nothing was answered


@pytest.mark.parametrize("odd", [{"metadata": "x"}, {"metadata": {"title": ""}}])
def test_what_a_browser_sends_may_be_anything(odd):
    assert plain([{"role": "assistant", "content": "a", **odd}]) == [{"role": "assistant", "content": "a"}]


def test_a_turn_keeps_thoughts_apart(tmp_path):
    with running(talker(tmp_path / "tiny", "qwen3"), max_new_tokens=120) as server:
        answers = server.served.answers

        async def ask() -> Turn:
            turn = Turn(answers, list(answers.models))
            async for _ in turn.progress(list(THOUGHT[:1]), answers.sampling, "me", "page", 0):
                pass
            return turn

        turn = asyncio.run(ask())
    assert turn.answer(0) == [THOUGHT[1]] and "tokens/s" in turn.status
