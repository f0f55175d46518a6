"""A GGUF file's tokenizer and configuration are converted once, and what is kept is checked each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medicalgpt_cli.engine.model.gguf_parts import gguf_config, gguf_tokenizer
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from tests.cli import environment
from tests.engine.model.tiny_gguf import tiny_gguf

# Converting imports gguf; reading what was kept does not.
_READ = (
    "import sys; from pathlib import Path; from medicalgpt_cli.engine.model.gguf_parts import *; "
    "path = Path(sys.argv[1]); tokenizer = gguf_tokenizer(path); gguf_config(path); "
    "print('gguf' in sys.modules, *tokenizer('患者 2025 cough')['input_ids'])"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf"))[0]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MEDGPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def read(path: Path, home: Path) -> tuple[bool, list[str]]:
    """(whether it was converted, ids of a sample), in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(path)],
        env=environment({"MEDGPT_HOME": str(home)}),
        capture_output=True,
        text=True,
        check=True,
    )
    converted, *ids = done.stdout.split()
    return converted == "True", ids


def test_the_second_command_converts_nothing_and_reads_the_same(made, home) -> None:
    converted, first = read(made, home)
    assert converted
    assert read(made, home) == (False, first)
    (kept,) = (one for one in (home / "gguf").iterdir() if one.is_dir())
    assert {one.name for one in kept.iterdir()} == {"tokenizer", "config", "files.json"}


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_what_was_changed_is_made_anew(made, home, damage) -> None:
    before, config = fingerprint(gguf_tokenizer(made)), gguf_config(made).to_dict()
    (kept,) = (one for one in (home / "gguf").iterdir() if one.is_dir())
    file = kept / "tokenizer" / "tokenizer.json"
    if damage == "changed":
        file.write_text(file.read_text(encoding="utf-8").replace("assistant", "assistent"), encoding="utf-8")
    elif damage == "missing":
        file.unlink()
    else:
        (kept / "tokenizer" / "chat_template.jinja").write_text("other", encoding="utf-8")
        (kept / "tokenizer" / "added_tokens.json").write_text("{}", encoding="utf-8")
    assert fingerprint(gguf_tokenizer(made)) == before
    assert gguf_config(made).to_dict() == config


def test_another_file_of_the_same_name_is_read_anew(made, home, tmp_path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(made.read_bytes())
    before = gguf_tokenizer(copy)
    other = copy.read_bytes().replace(b"You are a ", b"You are 1 ")
    copy.write_bytes(other)
    assert fingerprint(gguf_tokenizer(copy)) != fingerprint(before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_no_reason_to_stop(made, home) -> None:
    home.mkdir(mode=0o500)
    assert gguf_tokenizer(made)("cough")["input_ids"]


def test_a_home_that_is_a_file_is_no_reason_to_stop(made, home) -> None:
    home.write_text("")
    assert gguf_tokenizer(made)("cough")["input_ids"]
    assert gguf_config(made).max_position_embeddings == 2048
