"""What `medgpt data` and `--dry-run` put on the screen."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.inspection import Inspection, inspect
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.terminal.data_view import mask_text, show_data
from tests.conftest import DATA
from tests.tiny import tiny_tokenizer, write_jsonl

TURNS = [{"role": "user", "content": "fever?"}, {"role": "assistant", "content": "rest \x1b[31m and 多饮水"}]
PAIR = {"prompt": "fever?", "chosen": "rest well", "rejected": "no idea"}


def look(path: Any, tokenizer: Any = None, max_length: int = 512) -> Inspection:
    return inspect([str(path)], Counts(), tokenizer, max_length, Observer())


def shown(
    tmp_path, *rows: Any, tokenizer: Any = None, number: int = 1, colour: bool = False, width: int = 100
) -> str:
    rows = rows or ({"messages": TURNS}, {"question": "cough?", "answer": ""})
    found = look(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    show_data(found, tokenizer, number, console)
    return out.getvalue()


def test_the_mask_without_colour_stands_in_brackets(tmp_path):
    text = shown(tmp_path, tokenizer=tiny_tokenizer("chatml"))
    assert "<|im_start|>assistant\n⟦rest ·[31m and 多饮水<|im_end|>⟧" in text
    assert "1 used of 2 read" in text and "a.jsonl:2" in text  # the second record has no answer


def test_the_mask_in_colour_and_no_escape_from_the_data(tmp_path):
    text = shown(tmp_path, tokenizer=tiny_tokenizer("chatml"), colour=True)
    assert "⟦" not in text
    assert "\x1b[1;32mrest ·[31m and 多饮水<|im_end|>" in text


def test_without_a_model_turns_are_shown_in_characters(tmp_path):
    text = shown(tmp_path)
    assert "length in characters" in text and "assistant: ⟦rest" in text


def test_no_example_and_one_too_many(tmp_path):
    assert "⟦" not in shown(tmp_path, number=0)
    assert "the last one is 1" in shown(tmp_path, number=2)


def test_both_answers_of_a_pair(tmp_path):
    text = shown(tmp_path, PAIR)
    assert "chosen: ⟦rest well⟧\nrejected: no idea" in text and "pairs             1" in text
    text = shown(tmp_path, PAIR, tokenizer=tiny_tokenizer("chatml"))
    assert "chosen:\n" in text and "⟦rest well<|im_end|>⟧" in text and "⟦no idea<|im_end|>⟧" in text


def test_a_ranking(tmp_path):
    text = shown(tmp_path, {"prompt": "fever?", "responses": ["a", "b", "c"], "scores": [1, 3, 3]})
    assert "answer of rank 1: ⟦b⟧\nanswer of rank 1: ⟦c⟧\nanswer of rank 2: a" in text


def test_tools_calls_and_reasoning(tmp_path):
    call = {"name": "dose", "arguments": {"体重": 40}}
    tool = {"name": "dose", "description": "in mg", "parameters": {"properties": {"体重": {}}}}
    turns = [
        {"role": "user", "content": "dose?"},
        {"role": "assistant", "content": "", "reasoning_content": "look it up", "tool_calls": [call]},
        {"role": "tool", "content": "400"},
        {"role": "assistant", "content": "400 mg"},
    ]
    text = shown(tmp_path, {"messages": turns, "tools": [tool]})
    assert "tool  dose(体重)  in mg" in text
    assert 'assistant, reasoning: ⟦look it up⟧\nassistant, call: ⟦dose {"体重": 40}⟧\ntool: 400' in text
    assert "tools 1, calls of tools 1, reasoning 1" in text


def test_weights_labels_and_options(tmp_path):
    turns = [
        TURNS[0],
        {**TURNS[1], "weight": 0},
        TURNS[0],
        {"role": "assistant", "content": "ok", "train": 0.5},
    ]
    text = shown(tmp_path, {"messages": turns})
    assert "assistant, weight 0, context only: rest" in text and "assistant, weight 0.5: ⟦ok⟧" in text
    text = shown(tmp_path, {"messages": TURNS, "label": False}, {"messages": TURNS, "label": True})
    assert "label  bad: nothing is learnt" in text and "⟦" not in text.split("what is learnt stands")[1][30:]
    text = shown(tmp_path, {"question": "which?", "options": ["x", "y"], "answer": 1})
    assert "right option  B" in text and "assistant: ⟦B. y⟧" in text


def test_all_wrong_records_are_listed(tmp_path):
    rows = [{"question": f"{n}?", "answer": n if n % 2 else "x"} for n in range(60)]
    text = shown(tmp_path, *rows)
    assert "wrong records: 30" in text and text.count("answer is a number, not text") == 20
    assert "a.jsonl:40: " in text and "… and 10 more" in text
    assert "assistant: ⟦x⟧" in text  # and what can be shown is shown


@pytest.mark.parametrize("colour", [False, True])
def test_wide_text_at_80_columns(colour, tmp_path):
    text = shown(tmp_path, {"问题": "发烧三天，" * 60, "回答": "多喝水。" * 60}, colour=colour, width=80)
    assert "多喝水。" * 60 in text and "Chinese 100%" in text


def test_a_long_example_is_cut():
    tokenizer = tiny_tokenizer("chatml")
    found = look(DATA / "cmtmedqa_zh_sharegpt.jsonl", tokenizer, 10**6)
    longest = max((one for item in found.items for one in item.examples), key=lambda one: len(one.input_ids))
    longest.input_ids, longest.labels = longest.input_ids * 9, longest.labels * 9
    assert len(mask_text(longest, tokenizer, False)) < 4200


def test_the_report_counts_what_max_length_cuts():
    tokenizer = tiny_tokenizer("chatml")
    found = look(DATA / "medquad_en_alpaca.jsonl", tokenizer, 300)
    report, examples = found.report, [one for item in found.items for one in item.examples]
    assert report["used"] == report["read"] == len(examples) == 40
    assert report["longer"] == sum(report["truncated"].values()) > 0
    assert report["total_length"] == report["tokens"] + report["tokens_cut"]
    assert sum(bar["count"] for bar in report["histogram"]) == 40
    assert report["lengths"]["max"] > 300 and max(len(one.input_ids) for one in examples) == 300
