"""`medgpt infer` on questions with tools and reasoning, and what is said about a file of questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.engine.data.tool_messages import as_functions
from tests.cli import medgpt
from tests.talker import ANSWER, CALL, PLAIN, QUESTION, RESULT, THOUGHT, TOOLS, talker
from tests.tiny import tiny_model, write_jsonl

ARGUMENTS = CALL["tool_calls"][0]["arguments"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("infer_tools")
    talker(folder / "model", "qwen3")
    tiny_model(folder / "tiny")
    return folder


def infer(place: Path, rows, *more, model: str = "model", name: str = "out.jsonl"):
    write_jsonl(place / "in.jsonl", rows)
    done = medgpt(
        *("infer", "--base-model", model, "--data-file", "in.jsonl", "--predictions-file", name, "--use-cpu"),
        *("--dtype", "fp32", "--max-new-tokens", 120, "--overwrite", *more),
        cwd=place,
    )
    found = (
        [json.loads(line) for line in (place / name).read_text().splitlines()] if not done.returncode else []
    )
    return done, found


ASKED = {"id": "call", "messages": [QUESTION], "tools": as_functions(TOOLS)}


def test_calls_and_reasoning_stand_in_fields_of_their_own(place: Path):
    earlier = {
        "role": "assistant",
        "content": None,
        "reasoning_content": CALL["reasoning"],
        "tool_calls": [{"id": "c1", "type": "function", "function": {
            "name": "dose", "arguments": json.dumps(ARGUMENTS, ensure_ascii=False)}}],
    }  # fmt: skip
    result = {"role": "tool", "tool_call_id": "c1", "content": RESULT["content"]}
    rows = [ASKED, {**ASKED, "id": "result", "messages": [QUESTION, earlier, result]}]
    rows += [{"id": "thought", "prompt": THOUGHT[0]["content"]}]
    done, found = infer(place, rows, "--batch-size", 3)
    assert done.returncode == 0, done.stderr
    before = json.loads(json.dumps(found))
    call, answer, thought = found
    [made] = call.pop("tool_calls")
    assert json.loads(made["function"].pop("arguments")) == ARGUMENTS
    assert made.pop("id") and made == {"type": "function", "function": {"name": "dose"}}
    tokens = {"prompt_tokens", "completion_tokens"}
    assert {key: value for key, value in call.items() if key not in tokens} == {
        "id": "call", "input": QUESTION["content"], "output": "", "reasoning_content": CALL["reasoning"],
        "finish_reason": "tool_calls",
    }  # fmt: skip
    assert (answer["output"], answer["reasoning_content"]) == (ANSWER["content"], ANSWER["reasoning"])
    assert answer["finish_reason"] == "stop" and "tool_calls" not in answer
    assert answer["input"][1:] == [earlier, result]
    assert (thought["output"], thought["reasoning_content"]) == (
        THOUGHT[1]["content"],
        THOUGHT[1]["reasoning"],
    )
    _, same = infer(place, rows, "--batch-size", 1, name="again.jsonl")
    assert same == before


def test_several_processes_write_the_same_fields(place: Path):
    rows = [{**ASKED, "id": str(number)} for number in range(3)] + [{"prompt": THOUGHT[0]["content"]}]
    _, alone = infer(place, rows)
    done, found = infer(place, rows, "--processes", 2, "--batch-size", 1, name="two.jsonl")
    assert done.returncode == 0, done.stderr
    assert found == alone and found[0]["tool_calls"] and found[3]["reasoning_content"]


def test_a_turn_of_an_answer_is_a_record_that_training_reads(place: Path):
    """What infer writes goes back into a conversation as it is."""
    _, [call] = infer(place, [ASKED])
    turn = {"role": "assistant", "content": call["output"]}
    turn |= {key: call[key] for key in ("reasoning_content", "tool_calls")}
    record = read_record(Row("a", 1, {"messages": [QUESTION, turn], "tools": ASKED["tools"]}), Counts())
    made = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": call["tool_calls"][0]["id"]}]}
    assert record.messages[1] == made and record.tools == TOOLS


def test_thinking_is_turned_off_or_refused(place: Path):
    done, [row] = infer(place, [{"prompt": PLAIN[0]["content"]}], "--thinking", "off")
    assert done.returncode == 0, done.stderr
    assert row["output"] == PLAIN[1]["content"] and "reasoning_content" not in row
    for model, more, words in (
        ("tiny", (), "--thinking on: the chat template has no switch"),
        ("model", ("--no-prompt",), "--thinking goes with the chat template"),
    ):
        done, _ = infer(place, [{"prompt": "Why?"}], "--thinking", "on", *more, model=model)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_what_of_the_file_is_not_used_is_said(place: Path):
    rows = [
        {"question": "Why is iron low?", "answer": "Loss of blood.", "department": "blood", "id": "1"},
        {"question": "Why is iron high?", "answer": "Many reasons.", "department": "blood", "id": "2"},
        {
            **ASKED,
            "messages": [QUESTION, {"role": "assistant", "content": "One.", "weight": 0}],
            "label": True,
        },
        {"questions": ["Why?", "Why so?"], "answers": ["One."]},
    ]
    done, found = infer(place, rows, "--max-new-tokens", 2)
    assert done.returncode == 0 and len(found) == 4, done.stderr
    assert "department is not used in 2 records" in done.stderr
    for words in (
        "4 of 4 records: what stands behind the last question is not shown to the model",
        "1 of 4 records: other phrasings of the question are not asked",
        "1 of 4 records: whether its answer is marked as good or bad means nothing here",
        "1 of 4 records: weights of answers mean nothing here",
    ):
        assert words in done.stderr


def test_tools_of_a_template_without_them_are_written_in_a_plain_form_which_is_said(place: Path):
    done, _ = infer(place, [ASKED, {"prompt": "Why?"}], "--max-new-tokens", 2, model="tiny")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 questions: tools written in a plain form" in done.stderr
    done, _ = infer(place, [ASKED], "--no-prompt")
    assert done.returncode == 2 and "a question with tools cannot be continued as raw text" in done.stderr


def test_a_call_that_is_cut_is_text(place: Path):
    _, [row] = infer(place, [ASKED], "--max-new-tokens", 24)
    assert row["finish_reason"] == "length" and "tool_calls" not in row
    assert row["output"].startswith("<tool_call>") and row["reasoning_content"] == CALL["reasoning"]
