"""`medgpt chat` with thoughts and calls: folded, kept in saved conversations, and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.engine.data.tool_messages import as_functions
from medicalgpt_cli.engine.generation.conversation import Conversation
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import ChatSettings
from tests.cli import command, medgpt
from tests.commands.test_chat import Terminal
from tests.talker import ANSWER, CALL, PLAIN, QUESTION, RESULT, THOUGHT, TOOLS, talker
from tests.tiny import text, tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat_tools")
    talker(folder / "model", "qwen3")
    tiny_model(folder / "tiny")
    return folder


def chat(place: Path, lines: str, *more: object):
    options = ("--base-model", "model", "--max-new-tokens", 120, "--dtype", "fp32", "--use-cpu")
    return medgpt("chat", *options, *more, cwd=place, input=lines)


def test_thoughts_are_folded_and_shown_when_asked_for(place: Path):
    done = chat(place, f"{THOUGHT[0]['content']}\n/thoughts\n/save kept.json\n/reset\n/thoughts\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == THOUGHT[1]["content"] + "\n"
    told = done.stderr.split("/thoughts shows them")
    assert "thought · " in told[0] and THOUGHT[1]["reasoning"] not in told[0]
    assert THOUGHT[1]["reasoning"] in told[1]
    saved = json.loads((place / "kept.json").read_text())
    turn = {
        "role": "assistant",
        "content": THOUGHT[1]["content"],
        "reasoning_content": THOUGHT[1]["reasoning"],
    }
    assert saved == {"messages": [THOUGHT[0], turn]}
    record = read_record(Row("kept.json", 1, saved), Counts())
    assert record.messages == THOUGHT  # as training reads it


def test_a_conversation_with_tools_is_taken_up_and_its_call_answered(place: Path):
    asked = {"messages": [QUESTION], "tools": as_functions(TOOLS), "department": "x"}
    (place / "asked.json").write_text(json.dumps(asked))
    first = chat(place, "/retry\n/save called.json\n", "--load", "asked.json")
    assert first.returncode == 0, first.stderr
    for words in ("department is not used", "tools that may be called: dose", "/retry asks it"):
        assert words in first.stderr
    assert '→ dose({"kg": 40, "drug": "扑热息痛"}) · /result TEXT' in first.stderr
    third = chat(place, f"/result {RESULT['content']}\n/save all.json\n/result x\n", "--load", "called.json")
    assert third.stdout == ANSWER["content"] + "\n" and "→ dose" in third.stderr
    assert "no tool was called" in third.stderr
    saved = json.loads((place / "all.json").read_text())
    assert [one["role"] for one in saved["messages"]] == ["user", "assistant", "tool", "assistant"]
    record = read_record(Row("all.json", 1, saved), Counts())
    made = record.messages[1]["tool_calls"][0]
    assert {key: made[key] for key in ("name", "arguments")} == CALL["tool_calls"][0]
    assert record.messages[2]["tool_call_id"] == made["id"] and record.tools == TOOLS


def test_thinking_is_turned_off_or_refused(place: Path):
    done = chat(place, PLAIN[0]["content"] + "\n", "--thinking", "off")
    assert done.stdout == PLAIN[1]["content"] + "\n" and "thought" not in done.stderr
    done = medgpt("chat", "--base-model", "tiny", "--thinking", "off", "--use-cpu", cwd=place, input="Why?\n")
    assert done.returncode == 2 and "the chat template has no switch for reasoning" in done.stderr


@pytest.fixture(scope="module")
def conversation(place: Path) -> Conversation:
    settings = ChatSettings(base_model=str(place / "model"), max_new_tokens=120, dtype="fp32", use_cpu=True)
    return Conversation.open(settings, Observer())


def test_thoughts_stay_out_of_a_later_prompt_as_the_template_says(conversation):
    conversation.reset()
    assert text(conversation.ask(THOUGHT[0]["content"])) == THOUGHT[1]["content"]
    assert conversation.turns[1]["reasoning"] == THOUGHT[1]["reasoning"]
    later = [*conversation.turns, {"role": "user", "content": "And?"}]
    prompt, _ = conversation.backend.fitted_prompt(later)
    assert "leaves with" not in conversation.backend.tokenizer.decode(prompt.ids)


def test_an_answer_stopped_in_its_thoughts_is_none(conversation):
    conversation.reset()
    pieces = conversation.ask(THOUGHT[0]["content"])
    for _ in range(6):
        next(pieces)
    pieces.close()
    assert conversation.turns == [] and conversation.thoughts
    assert text(conversation.retry()) == THOUGHT[1]["content"] and len(conversation.turns) == 2


def test_what_is_no_conversation_is_not_taken_up(conversation, tmp_path: Path):
    (tmp_path / "pair.json").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    with pytest.raises(DataError, match="not a saved conversation"):
        conversation.load(tmp_path / "pair.json")
    with pytest.raises(UsageError, match="no tool was called"):
        conversation.give_result("x")
    turns = [*THOUGHT, {"role": "system", "content": "Later."}]
    (tmp_path / "late.json").write_text(json.dumps({"messages": turns}))
    conversation.load(tmp_path / "late.json")
    assert [one["role"] for one in conversation.messages] == ["user", "assistant", "system"]


def test_a_mark_in_an_answer_is_no_reasoning_when_it_is_taken_up(conversation, tmp_path: Path):
    """A saved conversation is read as what was said, whatever the model wrote."""
    conversation.reset()
    said = [*PLAIN, QUESTION, {"role": "assistant", "content": "Hm? </think> Yes."}]
    said += [THOUGHT[0], {**THOUGHT[1], "content": "<think>a</think> b"}]
    conversation.turns = list(said)
    conversation.save(tmp_path / "kept.json")
    conversation.reset()
    conversation.load(tmp_path / "kept.json")
    assert conversation.turns == said


def test_thoughts_at_a_terminal_are_one_line(place: Path):
    options = ("--max-new-tokens", "120", "--dtype", "fp32", "--use-cpu")
    terminal = Terminal(command("chat", "--base-model", "model", *options), place)
    try:
        terminal.expect("/help for commands")
        terminal.expect("›")
        terminal.type(f"{THOUGHT[0]['content']}\r")
        terminal.expect("tokens/s")
        terminal.read(0.3)
        shown = "\n".join(terminal.lines)
        assert "thought · " in shown and "thinking" not in shown  # the second took the place of the first
        assert THOUGHT[1]["content"] in shown and THOUGHT[1]["reasoning"] not in shown
        terminal.type("/thoughts\r")
        terminal.expect(THOUGHT[1]["reasoning"])
        for _ in range(60):  # what is typed before the next prompt reads may be thrown away
            if terminal.process.poll() is not None:
                break
            terminal.type("\x04")
            terminal.read(0.5)
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
