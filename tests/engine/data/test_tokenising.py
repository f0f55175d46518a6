"""Examples as arrays, in memory and in the cache: the same as those made one by one, and found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medicalgpt_cli.engine.data import tokenising
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.example_table import ExampleTable, Part, side_counts, stretches_of
from medicalgpt_cli.engine.data.examples import IGNORED, Example, render_conversation
from medicalgpt_cli.engine.data.formats import iterate_conversations, load_conversations
from medicalgpt_cli.engine.data.tokenising import Rendering, tokenised
from medicalgpt_cli.engine.observer import Observer
from tests.tiny import tiny_tokenizer, write_jsonl


class Warned(Observer):
    def __init__(self):
        self.warnings: list[str] = []

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = []
    for number in range(40):
        turns = [
            {"role": "user", "content": f"Question {number} about fever?"},
            {"role": "assistant", "content": "Rest. " * (number % 7 + 1), "weight": (1, 0.5, 0)[number % 3]},
            {"role": "user", "content": "And tea?"},
            {"role": "assistant", "content": f"Yes, {number} cups."},
        ]
        rows.append({"messages": turns})
    rows.append(
        {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "x"}]}
    )
    return write_jsonl(tmp_path / "train.jsonl", rows)


@pytest.fixture
def on_disk(monkeypatch):
    """Every file counts as a large one, and all cores help from the third conversation on."""
    monkeypatch.setattr(tokenising, "SMALL", 0)
    monkeypatch.setattr(tokenising, "_CHUNK", 2)
    monkeypatch.setattr(tokenising, "_FEW", 2)


def make(
    file: Path, cache: Path, observer: Observer | None = None, style: str = "chatml", length: int = 40
) -> Part:
    counts = Counts()
    conversations = iterate_conversations([str(file)], counts, observer or Observer())
    rendering = Rendering(tiny_tokenizer(style), length)
    return tokenised(str(file), rendering, conversations, counts, {}, cache, observer or Observer())


def everything(part: Part) -> ExampleTable:
    return ExampleTable([part], [np.arange(len(part.examples))])


@pytest.mark.parametrize("style", ["chatml", "qwen3"])
def test_a_table_gives_the_examples_and_counts_of_its_conversations(file, tmp_path, style):
    part, counts = make(file, tmp_path, style=style), Counts()
    conversations = load_conversations([str(file)], Counts(), Observer())
    expected = [x for c in conversations for x in render_conversation(tiny_tokenizer(style), c, 40, counts)]
    table = everything(part)
    assert list(table) == expected
    assert table[3:5] == expected[3:5] and table[-1] == expected[-1]
    assert table.lengths.tolist() == [len(one.input_ids) for one in expected]
    assert table.targets.tolist() == [sum(x != IGNORED for x in one.labels[1:]) for one in expected]
    assert table.is_weighted == any(one.weights for one in expected)
    found = side_counts([part], [np.ones(len(part.conversations), dtype=bool)])
    said = counts.as_dict()
    assert found == {name: said[name] for name in found}
    with pytest.raises(IndexError):
        table[len(table)]


def test_stretches():
    one = Example([1, 2, 3, 4, 5, 6], [IGNORED, 2, 3, IGNORED, 5, 6], "", None, [1, 1, 2, 1, 2, 2])
    assert stretches_of(one).tolist() == [(1, 2, 1.0), (2, 3, 2.0), (4, 6, 2.0)]
    assert stretches_of(Example([1, 2], [IGNORED, IGNORED], "")).tolist() == []
    assert stretches_of(Example([1, 2], [1, 2], "")).tolist() == [(0, 2, 1.0)]


def test_the_cache_holds_what_memory_holds_and_is_read_again(file, tmp_path, on_disk, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(tokenising, "SMALL", 2**20)
        expected = make(file, tmp_path / "none")
        assert not (tmp_path / "none").exists()  # of a small file, nothing is written
    part = make(file, tmp_path / "cache")
    assert list(everything(part)) == list(everything(expected))
    assert everything(part).fingerprint() == everything(expected).fingerprint()
    assert part.meta["counts"] == expected.meta["counts"]
    (folder,) = [one for one in (tmp_path / "cache/examples").iterdir() if one.is_dir()]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(one.stat().st_mode & 0o777 == 0o600 for one in folder.iterdir())
    assert b"fever" not in b"".join(one.read_bytes() for one in folder.iterdir())  # ids, but no text
    monkeypatch.setattr(tokenising, "render_chunk", None)  # nothing is rendered any more
    again = make(file, tmp_path / "cache")
    assert everything(again).fingerprint() == everything(part).fingerprint()


def test_another_tokenizer_length_or_content_is_another_folder(file, tmp_path, on_disk):
    make(file, tmp_path)
    make(file, tmp_path, length=41)
    make(file, tmp_path, style="qwen3")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    make(file, tmp_path)
    assert len([one for one in (tmp_path / "examples").iterdir() if one.is_dir()]) == 4


def test_a_damaged_folder_is_made_anew_and_said(file, tmp_path, on_disk):
    expected = everything(make(file, tmp_path)).fingerprint()
    (folder,) = [one for one in (tmp_path / "examples").iterdir() if one.is_dir()]
    for name in ("tokens.bin", "examples.bin", "meta.json"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        observer = Warned()
        assert everything(make(file, tmp_path, observer)).fingerprint() == expected
        assert len(observer.warnings) == 1 and "made anew" in observer.warnings[0]
    assert not Warned().warnings


def test_a_bad_record_leaves_no_folder(file, tmp_path, on_disk):
    from medicalgpt_cli.errors import DataError

    with file.open("a") as more:
        more.write('{"messages": 7}\n')
    with pytest.raises(DataError):
        make(file, tmp_path)
    assert not [one for one in (tmp_path / "examples").iterdir() if one.is_dir()]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """`sft --dry-run` of a file that becomes four times as long, in processes of their own."""
    from tests.benchmarks.many_rows import write_rows

    peaks = {}
    for rows in (60_000, 240_000):
        path = tmp_path / f"{rows}.jsonl"
        write_rows(path, rows)
        code = (
            "import resource, subprocess, sys\n"
            "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
            "sys.exit(done.returncode)"
        )
        command = (
            sys.executable,
            "-m",
            "medicalgpt_cli",
            "sft",
            "--train-data",
            str(path),
            "--dry-run",
            "--json",
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            env={**os.environ, "MEDGPT_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks[rows] = int(json.loads(done.stdout)) / 1024
    assert peaks[240_000] - peaks[60_000] < 180  # MiB: less than a KiB a row


def test_what_another_process_raises_is_raised_here_and_a_lost_one_is_said(tmp_path, on_disk, monkeypatch):
    from medicalgpt_cli.engine.data.messages import Conversation
    from medicalgpt_cli.errors import EnvironmentFailure, UsageError

    said = ({"role": "user", "content": "Fever?"}, {"role": "assistant", "content": "Rest."})
    rows = [Conversation(said, f"made.jsonl:{number}") for number in range(1, 9)]
    no_template = tiny_tokenizer("none")
    with pytest.raises(UsageError, match="no chat template"):
        list(tokenising._by_others(iter([rows]), Rendering(no_template, 64), 2))
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with tokenising._Child(Rendering(tokenizer, 64), str(tmp_path / "tokenizer")) as child:
        child._process.kill()
        with pytest.raises(EnvironmentFailure, match="ended by itself"):
            for _ in range(2):
                child.ask(rows)
                child.answer()
    tiny_tokenizer("none").save_pretrained(tmp_path / "other")
    with tokenising._Child(Rendering(tokenizer, 64), str(tmp_path / "other")) as child:
        child.ask(rows)
        with pytest.raises(EnvironmentFailure, match="another one after it was saved"):
            child.answer()


def test_the_program_itself_is_not_run_again_by_the_others(tmp_path):
    """Whatever it was started as: a script without a guard, too."""
    script = tmp_path / "program.py"
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"q {n}", "answer": "a"} for n in range(40)])
    script.write_text(f"""
import pathlib, sys
with open({str(tmp_path / "runs")!r}, "a") as file: file.write("x")
from medicalgpt_cli.engine.data import tokenising
from tests.engine.data.test_tokenising import make
tokenising.SMALL, tokenising._CHUNK, tokenising._FEW = 0, 4, 4
print(len(make(pathlib.Path({str(path)!r}), pathlib.Path({str(tmp_path)!r})).examples))
""")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "40" and (tmp_path / "runs").read_text() == "x"
