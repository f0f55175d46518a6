"""The shapes of files that people bring from other collections, in our own words: each loads, or says a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import iterate_texts, load_conversations, load_prompts
from medicalgpt_cli.engine.data.preferences import load_pairs
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError
from tests.tiny import write_jsonl

ASK, SAY = "孩子发烧怎么办？", "多喝水，超过三天请就医。"
EXCHANGE = [("user", ASK), ("assistant", SAY)]
CALL = {"name": "get_dose", "arguments": {"kg": 12}}
TOOLS = [{"name": "get_dose", "description": "剂量", "parameters": {"type": "object", "properties": {}}}]
CALLED = [
    {"from": "human", "value": "用多少？"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": '{"mg": 120}'},
    {"from": "gpt", "value": "120 毫克。"},
]


def said(conversation: Any) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in conversation.messages]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]},
        {"instruction": ASK, "input": "", "output": SAY},
        {"instruction": ASK, "input": "", "output": SAY, "system": "", "history": []},
        {"question": ASK, "answer": SAY},
        {
            "messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}],
            "label": True,
        },
        {"prompt": ASK, "completion": SAY},
        {
            "prompt": [{"role": "user", "content": ASK}],
            "completion": [{"role": "assistant", "content": SAY}],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": ASK}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": SAY}], "loss_weight": 1.0},
            ]
        },
        {"conversation": [{"human": ASK, "assistant": SAY}]},
        {"conversation": [{"system": "", "input": ASK, "output": SAY}]},
        {"data": [f"问：{ASK}", f"答：{SAY}"]},
    ],
    ids=[
        *("MedicalGPT sft", "alpaca", "LLaMA-Factory alpaca", "grpo", "LLaMA-Factory kto", "TRL completion"),
        *("TRL messages", "LLaMA-Factory v1", "Firefly", "XTuner", "HuatuoGPT"),
    ],
)
def test_one_exchange_in_every_shape(row, tmp_path):
    counts = Counts()
    (found,) = load_conversations([str(write_jsonl(tmp_path / "a.jsonl", [row]))], counts, Observer())
    assert said(found) == EXCHANGE
    assert not counts.unused() and not counts.skipped


@pytest.mark.parametrize(
    "row",
    [
        {
            "system": "",
            "history": [],
            "question": ASK,
            "response_chosen": SAY,
            "response_rejected": "不知道。",
        },
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": SAY},
            "rejected": {"from": "gpt", "value": "不知道。"},
        },
        {
            "chosen_messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}],
            "rejected_messages": [
                {"role": "user", "content": ASK},
                {"role": "assistant", "content": "不知道。"},
            ],
        },
        {"instruction": ASK, "input": "", "chosen": SAY, "rejected": "不知道。"},
    ],
    ids=["MedicalGPT reward", "LLaMA-Factory dpo", "LLaMA-Factory v1 dpo", "LLaMA-Factory ranking"],
)
def test_pairs_in_every_shape(row, tmp_path):
    counts = Counts()
    (found,) = load_pairs([str(write_jsonl(tmp_path / "a.jsonl", [row]))], counts, Observer())
    assert (said(found), found.chosen, found.rejected) == ([("user", ASK)], SAY, "不知道。")
    assert not counts.unused()


def test_calls_of_tools(tmp_path):
    rows = [{"conversations": CALLED, "tools": json.dumps(TOOLS, ensure_ascii=False)}]
    (tmp_path / "glaive.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    counts = Counts()
    (found,) = load_conversations([str(tmp_path / "glaive.json")], counts, Observer())
    assert found.tools == tuple(TOOLS) and found.messages[1]["tool_calls"] == [CALL]
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert not counts.unused()


def test_pictures_are_counted_and_never_learnt_as_their_mark(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>这是什么？"},
                {"role": "assistant", "content": "骨折。"},
            ],
            "images": ["a.jpg"],
        },
        {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]},
    ]
    counts = Counts()
    found = load_conversations([str(write_jsonl(tmp_path / "a.jsonl", rows))], counts, Observer())
    assert [said(one) for one in found] == [EXCHANGE] and sum(counts.skipped.values()) == 1


def test_texts_and_prompts(tmp_path):
    write_jsonl(tmp_path / "c4.jsonl", [{"text": ASK}])
    (tmp_path / "wiki.txt").write_text(f"{ASK}\n{SAY}\n", encoding="utf-8")
    found = iterate_texts([str(tmp_path)], Counts(), Observer())
    assert [one.text for one in found] == [ASK, ASK, SAY]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": ASK}]}])
    (found,) = load_prompts([str(path)], Counts(), Observer())
    assert said(found) == [("user", ASK)]


@pytest.mark.parametrize("row", [{"data": [ASK, SAY]}, {"conversation": [{"human": ASK}]}, {"ask_me": ASK}])
def test_what_is_no_shape_of_any_says_so(row, tmp_path):
    with pytest.raises(DataError) as caught:
        load_conversations([str(write_jsonl(tmp_path / "a.jsonl", [row]))], Counts(), Observer())
    assert "a.jsonl:1" in caught.value.message and caught.value.hint
    assert ASK not in f"{caught.value.message}{caught.value.hint}"


def folder(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    (place / "finetune").mkdir(parents=True)
    write_jsonl(place / "finetune" / "a.jsonl", [{"question": ASK, "answer": SAY}])
    (place / "dataset_info.json").write_text('{"a": {"file_name": "finetune/a.jsonl"}}')
    return place


def test_a_folder_with_llama_factorys_list_of_data_sets(tmp_path):
    counts = Counts()
    (found,) = load_conversations([str(folder(tmp_path))], counts, Observer())
    assert said(found) == EXCHANGE
    assert any("dataset_info.json" in notice for notice in counts.notices)
