"""The preference file: pairs that `medgpt reward` reads, from votes and from thumbs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.preferences import load_pairs
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.serving.feedback import FeedbackFile

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "头痛怎么办？\n\n“quoted”"}]


def pairs(path: Path):
    return load_pairs([str(path)], Counts(), Observer())


def test_a_vote_is_a_pair(tmp_path: Path):
    path = tmp_path / "new" / "pairs.jsonl"
    file = FeedbackFile(path)
    assert file.prefer(PROMPT, "多休息。", "不知道。")
    assert not file.prefer(PROMPT, "same", " same") and not file.prefer(PROMPT, "", "x")
    [pair] = pairs(path)
    assert (pair.chosen, pair.rejected, list(pair.messages)) == ("多休息。", "不知道。", PROMPT)
    assert path.stat().st_mode & 0o077 == 0
    FeedbackFile(path).prefer(PROMPT, "a", "b")  # a later run appends
    assert len(pairs(path)) == 2


def test_two_opposite_thumbs_are_a_pair(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    file = FeedbackFile(path)
    assert file.rate("ana", PROMPT, "bad", False) == 0
    assert file.rate("bo", PROMPT, "good", True) == 0  # another person
    assert file.rate("ana", PROMPT[1:], "good", True) == 0  # another conversation
    assert file.rate("ana", PROMPT, "good", True) == 1
    assert file.rate("ana", PROMPT, "good", True) == 0  # pressed twice
    assert file.rate("ana", PROMPT, "worse", False) == 1
    assert [(pair.chosen, pair.rejected) for pair in pairs(path)] == [("good", "bad"), ("good", "worse")]


def test_lines_stay_whole_under_load(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    file = FeedbackFile(path)

    def work(number: int) -> None:
        for turn in range(20):
            file.prefer(PROMPT, f"{number} {turn} " + "x" * 5000, "no")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pairs(path)) == 160


def test_a_file_that_cannot_be_written_is_said_before_the_start(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="--feedback-file"):
        FeedbackFile(tmp_path / "folder")
