"""What `medgpt data` and `--dry-run` put on the screen."""

from __future__ import annotations

import io

from rich.console import Console

from medicalgpt_cli.engine.data.report import inspect
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.terminal.data_view import mask_text, show_data
from tests.conftest import DATA
from tests.tiny import tiny_tokenizer, write_jsonl

TURNS = [{"role": "user", "content": "fever?"}, {"role": "assistant", "content": "rest \x1b[31m and 多饮水"}]


def shown(tmp_path, tokenizer, number=1, colour=False, max_length=512) -> str:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": TURNS[:1]}])
    found = inspect([str(path)], tokenizer, max_length, Observer())
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=colour, color_system="standard" if colour else None)
    show_data(found.report, found.conversations, found.examples, tokenizer, number, console)
    return out.getvalue()


def test_the_mask_without_colour_stands_in_brackets(tmp_path):
    text = shown(tmp_path, tiny_tokenizer("chatml"))
    assert "<|im_start|>assistant\n⟦rest ·[31m and 多饮水<|im_end|>⟧" in text
    assert "1 used of 2 read" in text and "a.jsonl:2" in text  # the second record has no answer


def test_the_mask_in_colour_and_no_escape_from_the_data(tmp_path):
    text = shown(tmp_path, tiny_tokenizer("chatml"), colour=True)
    assert "⟦" not in text
    assert "\x1b[1;32mrest ·[31m and 多饮水<|im_end|>" in text


def test_without_a_model_turns_are_shown_in_characters(tmp_path):
    text = shown(tmp_path, None)
    assert "length in characters" in text and "assistant: ⟦rest" in text


def test_no_example_and_one_too_many(tmp_path):
    assert "⟦" not in shown(tmp_path, None, number=0)
    assert "the last one is 1" in shown(tmp_path, None, number=2)


def test_a_long_example_is_cut(tmp_path):
    tokenizer = tiny_tokenizer("chatml")
    found = inspect([str(DATA / "cmtmedqa_zh_sharegpt.jsonl")], tokenizer, 10**6, Observer())
    longest = max(found.examples, key=lambda one: len(one.input_ids))
    longest.input_ids, longest.labels = longest.input_ids * 9, longest.labels * 9
    assert len(mask_text(longest, tokenizer, False)) < 4200


def test_the_report_counts_what_max_length_cuts():
    tokenizer = tiny_tokenizer("chatml")
    found = inspect([str(DATA / "medquad_en_alpaca.jsonl")], tokenizer, 300, Observer())
    report = found.report
    assert report["used"] == report["read"] == len(found.examples) == 40
    assert report["longer"] == sum(report["truncated"].values()) > 0
    assert report["total_length"] == report["tokens"] + report["tokens_cut"]
    assert sum(bar["count"] for bar in report["histogram"]) == 40
    assert report["lengths"]["max"] > 300 and max(len(one.input_ids) for one in found.examples) == 300
