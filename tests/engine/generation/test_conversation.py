"""What a conversation remembers, forgets and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from medicalgpt_cli.engine.generation.answer_reader import content_of
from medicalgpt_cli.engine.generation.conversation import Conversation
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import ChatSettings
from tests.tiny import text, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("conversation") / "model", seed=3)


def talk(folder: Path, **settings) -> Conversation:
    settings = {"base_model": str(folder), "max_new_tokens": 8, **settings}
    return Conversation.open(ChatSettings(**settings), Observer())


def test_another_draw_is_another_answer_and_takes_the_place_of_the_first(folder):
    conversation = talk(folder, temperature=1.2)
    said = [text(conversation.ask("What is fever?"))]
    said += [text(conversation.retry()) for _ in range(3)]
    assert len(set(said)) == 4
    assert [one["content"] for one in conversation.turns] == ["What is fever?", said[-1]]
    again = talk(folder, temperature=1.2)
    assert [text(again.ask("What is fever?")), text(again.retry())] == said[:2]  # the seed decides


def test_a_greedy_retry_is_the_same_answer(folder):
    conversation = talk(folder)
    assert conversation.retry() is None
    assert text(conversation.ask("What is fever?")) == text(conversation.retry())
    assert len(conversation.turns) == 2


def test_a_question_without_an_answer_leaves_the_history_alone(folder):
    conversation = talk(folder, max_context=120)
    text(conversation.ask("What is fever?"))
    before = list(conversation.turns)
    with pytest.raises(UsageError, match="context of 120"):
        text(conversation.ask("fever " * 300))
    assert conversation.turns == before
    stopped = conversation.ask("Why?")
    first = content_of(next(stopped))
    stopped.close()
    assert conversation.turns == (before if not first else [*before, *conversation.turns[-2:]])
    first_of_retry = text(conversation.retry())  # of what was asked last, answered or not
    assert [one["content"] for one in conversation.turns[-2:]] == ["Why?", first_of_retry]


def test_the_system_prompt_stays_when_turns_are_dropped(folder):
    conversation = talk(folder, max_context=120, system_prompt="You are a doctor.")
    for _ in range(6):
        text(conversation.ask("What is fever?"))
    assert conversation.dropped > 0 and conversation.dropped % 2 == 0
    assert len(conversation.turns) == 12  # kept for /save, left out of the prompt only
    assert conversation.messages[0] == {"role": "system", "content": "You are a doctor."}


def test_saved_and_loaded(folder, tmp_path: Path):
    conversation = talk(folder, system_prompt="You are a doctor.")
    with pytest.raises(UsageError, match="nothing to save"):
        conversation.save(tmp_path / "empty.json")
    text(conversation.ask("感冒怎么办？"))
    conversation.save(tmp_path / "kept.json")
    other = talk(folder)
    other.load(tmp_path / "kept.json")
    assert other.messages == conversation.messages
    assert text(other.ask("Why?")) == text(conversation.ask("Why?"))
    with pytest.raises(UsageError, match="exists already"):
        conversation.save(tmp_path / "kept.json")
    with pytest.raises(UsageError, match="No such file"):
        conversation.save(tmp_path / "no" / "folder.json")
    before = list(other.turns)
    for content in ("3", "[1]", "{", "[" * 100_000, '{"messages": [{"role": "user"}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises((DataError, UsageError)):
            other.load(tmp_path / "bad.json")
    assert other.turns == before
