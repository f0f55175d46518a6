"""What the documentation tells people to type is understood by the program, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from medicalgpt_cli.commands.bridge import command_function
from medicalgpt_cli.commands.catalogue import COMMANDS, find
from tests.cli import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "docs" / "README.zh.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every `medgpt …` of the page's shell blocks: continued lines joined, `&&` taken apart."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("medgpt ") and "…" not in part]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        if words[0].startswith("-") or "--help" in words or "--recipe" in words:
            continue
        command, words = find(words)
        made = []
        program = typer.Typer(add_completion=False)
        program.command()(command_function(command.name, command.settings, made.append))
        words = words[: next((n for n, word in enumerate(words) if word in ("|", ">", ";")), None)]
        program(args=words, standalone_mode=False)
        assert isinstance(made[0], command.settings), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_there_are_commands_to_check() -> None:
    assert len(commands(ENGLISH)) >= 8 and sum(len(commands(page)) for page in PAGES) >= 60


def test_every_command_is_in_the_readme() -> None:
    text = ENGLISH.read_text(encoding="utf-8")
    for command in COMMANDS:
        name = command.name.split()[0]
        assert f"`medgpt {name}" in text or f"`{name}`" in text


def test_the_chinese_readme_is_in_step() -> None:
    def shape(page: Path) -> list[str]:
        return re.findall(r"^(#+) |^\| `(.*?)[` ]|^(```)", page.read_text(encoding="utf-8"), re.MULTILINE)

    assert blocks(CHINESE) == blocks(ENGLISH)
    assert shape(CHINESE) == shape(ENGLISH)
