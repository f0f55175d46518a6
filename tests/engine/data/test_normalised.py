"""Normalised records are read as what they were: the same messages, tools and answers, and the same token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.cleaning import write_clean
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_conversation
from medicalgpt_cli.engine.data.formats import iterate_texts, load_conversations, load_prompts
from medicalgpt_cli.engine.data.inspection import Inspection, inspect
from medicalgpt_cli.engine.data.normalised import line_of, normalised
from medicalgpt_cli.engine.data.preferences import load_pairs
from medicalgpt_cli.engine.data.prompts import load_rl_prompts
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.records import read_record
from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, MedgptError
from tests.engine.data.test_records import CALL, FEVER, GOOD, ORGANS, TOOL, ULTRA
from tests.tiny import tiny_tokenizer, write_jsonl

THINKING = {"role": "assistant", "content": "Drink.", "reasoning_content": "Hm."}
SHAPES: list[dict[str, Any]] = [
    *GOOD,
    ULTRA,
    {"question": "Dose?", "context": "He is 4.", "answer": "5 mg.", "id": 7},
    {"问题": "发烧？", "回答": "喝水。", "历史": [["你好", "请说"]]},
    {"Question": "Fever?", "Complex_CoT": "Hm.", "Response": "Drink."},
    {"question": "Fever?", "answer": "<think></think>Drink.</think>Really."},
    {"question": "Fever?", "answer": "<think>Hm.</think>Drink.</think>Really."},
    {"question": "Fever?", "answer": "Drink.\u2028Rest.\x85", "weight": 0.25},
    {"messages": [FEVER[0], THINKING, {"role": "user", "content": "Sure?"}, {**FEVER[1], "weight": 0}, *FEVER]},
    {"messages": [FEVER[0], FEVER[0], FEVER[1], FEVER[1], FEVER[0]]},
    {"messages": [FEVER[0], {**FEVER[1], "content": [{"type": "text", "text": "a"}]}], "label": True},
    {
        "conversations": [
            {"from": "human", "value": "Dose?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "400 mg"},
            {"from": "gpt", "value": "400 mg."},
        ],
        "tools": json.dumps([TOOL]),
    },
    {"questions": [["发烧？"], ["发热？"]], "answers": ["喝水。"], "system": "简短。"},
    {"questions": ["a", "b"], "answers": ["<think>Hm.</think>c"], "history": [["d", "e"]], "weight": 0.5},
    {"question": "Which?", "options": ORGANS, "answer": "AC", "explanation": "Because.", "system": "s"},
    {"question": "", "options": ORGANS, "answer": "B", "history": [["d", "e"]], "weight": 0.5},
    {"question": "Which?", "choices": ["Skin", "Heart"], "answer": 1, "reasoning": "Hm."},
    {"question": "Which?", "opa": "x", "opb": "y", "cop": "b", "output": "It is y.", "label": 1},
    {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 3, 3], "system": "s"},
    {"prompt": "a", "ranked": ["b", "c", "d"]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"history": [["d", "e"]], "question": "a", "response_chosen": "<think>x</think>b", "response_rejected": "c"},
    {"prompt": "Fever?"},
    {"messages": [{"role": "system", "content": "s"}, FEVER[0]]},
    {"text": "Fever is a sign.\n\nOf what?", "id": "x"},
]  # fmt: skip


def look(path: Path | str, **rules: Any) -> Inspection:
    return inspect([str(path)], Counts(**rules), None, 1024, Observer())


def clean(path: Path, output: Path, **rules: Any) -> Path:
    found = look(path, **rules)
    assert found.problem is None, found.problem
    write_clean(found, output, share=None, seed=0, deduplicate=False)
    return output


def loaded(path: Path) -> dict[str, Any]:
    """What each reader makes of a file, without places; the kind of error where it refuses the file."""
    tokenizer = tiny_tokenizer("chatml")
    found: dict[str, Any] = {}
    readers = {"sft": load_conversations, "reward": load_pairs, "rl": load_rl_prompts, "infer": load_prompts}
    for name, read in {**readers, "pretrain": iterate_texts}.items():
        try:
            made = list(read([str(path)], Counts(), Observer()))
        except MedgptError as problem:
            found[name] = type(problem).__name__
            continue
        if name == "pretrain":
            found[name] = [one.text for one in made]
            continue
        about = ("messages", "tools", "id", "chosen", "rejected", "options", "key")
        found[name] = [{key: getattr(one, key) for key in about if hasattr(one, key)} for one in made]
        if name == "sft":
            examples = [e for one in made for e in render_conversation(tokenizer, one, 512, Counts())]
            found["tokens"] = [(one.input_ids, one.labels) for one in examples]
        else:
            found[f"{name} tokens"] = [encode_prompt(tokenizer, one.messages) for one in made]
    return found


@pytest.mark.parametrize("row", SHAPES, ids=range(len(SHAPES)))
def test_a_clean_record_is_read_as_it_was_and_stays_as_it_is(row, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    once = clean(path, tmp_path / "once.jsonl")
    assert loaded(once) == loaded(path)
    assert clean(once, tmp_path / "twice.jsonl").read_bytes() == once.read_bytes()
    assert not look(once).report["unused"]  # all that stands there is made something of


WORDS = st.text("ab 热.\n<think>/", max_size=12)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": WORDS},
    optional={"reasoning_content": WORDS, "weight": st.sampled_from([0, 0.5, 1, 2])},
)
RECORD = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(TURN, min_size=1, max_size=4)}, optional={"system": WORDS}),
    st.fixed_dictionaries(
        {"question": WORDS, "answer": WORDS},
        optional={
            "history": st.lists(st.lists(WORDS, min_size=2, max_size=2), max_size=2),
            "system": WORDS,
            "weight": st.sampled_from([0, 0.5, 1, 2]),
            "label": st.booleans(),
            "context": WORDS,
            "reasoning": WORDS,
        },
    ),
    st.fixed_dictionaries(
        {"question": WORDS, "options": st.just(ORGANS), "answer": st.sampled_from(["A", "Heart", ["A", "C"]])},
        optional={"output": WORDS, "explanation": WORDS, "reasoning": WORDS, "system": WORDS},
    ),
    st.fixed_dictionaries({"prompt": WORDS, "chosen": WORDS, "rejected": WORDS}, optional={"system": WORDS}),
    st.fixed_dictionaries({"prompt": WORDS, "responses": st.just(["a", "b", "c"])}).flatmap(
        lambda row: st.lists(st.integers(0, 2), min_size=3, max_size=3).map(lambda ranks: {**row, "ranks": ranks})
    ),
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(RECORD)
def test_any_record_is_read_as_it_was_or_refused(row: dict[str, Any]):
    """`normalised` compares what it wrote itself; here what it wrote is normalised once more."""
    try:
        record = read_record(Row("a.jsonl", 1, row), Counts())
        if record is None:
            return
        value = normalised(record)
    except DataError:
        return
    again = read_record(Row("a.jsonl", 1, json.loads(line_of(value))), Counts())
    assert again is not None and normalised(again) == value
    assert [one["content"] for one in again.messages] == [one["content"] for one in record.messages]
    assert (again.answers, again.key, again.label) == (record.answers, record.key, record.label)


def test_groups_and_margins(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "patient": 7, "gap": "0.5"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    found = inspect([str(path)], Counts(group="patient"), None, 1024, Observer(), margin_column="gap")
    assert not found.report["unused"]
    write_clean(found, tmp_path / "b.jsonl", share=None, seed=0, deduplicate=False)
    (value,) = map(json.loads, (tmp_path / "b.jsonl").read_text("utf-8").splitlines())
    assert (value["group"], value["margin"]) == ("7", 0.5)
    (pair,) = load_pairs(
        [str(tmp_path / "b.jsonl")], Counts(group="group"), Observer(), margin_column="margin"
    )
    assert (pair.group, pair.margin) == ("7", 0.5)


def test_what_json_has_no_value_for_is_refused():
    import datetime

    call = {"name": "dose", "arguments": {"on": datetime.date(2026, 1, 1)}}  # of a Parquet file
    row = {"messages": [FEVER[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    record = read_record(Row("a.parquet", 3, row), Counts())
    assert record is not None
    with pytest.raises(DataError, match=r"a\.parquet:3: .* cannot be written") as caught:
        normalised(record)
    assert "2026" not in caught.value.message


def lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_answer_marked_as_bad_is_kept(tmp_path):
    rows = [{"messages": FEVER, "label": False}, {"question": "Cough?", "answer": "Tea.", "label": True}]
    once = clean(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl")
    assert [one["label"] for one in lines(once)] == [False, True]
