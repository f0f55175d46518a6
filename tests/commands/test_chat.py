"""`medgpt chat` through a pipe and at a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli import command, environment, medgpt
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_model(folder / "model", seed=3)
    return folder


def chat(place: Path, text: str, *more: object):
    return medgpt("chat", "--base-model", "model", "--max-new-tokens", "8", *more, cwd=place, input=text)


def turns(path: Path) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in json.loads(path.read_text())["messages"]]


def test_a_pipe_gets_answers_on_stdout_only(place: Path):
    done = chat(place, "What is fever?\n感冒怎么办？\n")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and "tokens/s" not in done.stdout
    again = chat(place, "What is fever?\n")
    assert done.stdout.startswith(again.stdout)
    assert len(done.stdout) > len(again.stdout)


def test_the_second_turn_remembers_and_commands_work(place: Path):
    script = "/system You are a doctor.\nWhat is fever?\nWhy?\n/save one.json\n/reset\nWhy?\n/save two.json\n"
    done = chat(place, script + "/save two.json\n/nosuch\n/help\n/exit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    one, two = turns(place / "one.json"), turns(place / "two.json")
    assert [role for role, _ in one] == ["system", "user", "assistant", "user", "assistant"]
    assert [role for role, _ in two] == ["system", "user", "assistant"]
    assert one[4] != two[2]  # the same question with and without a history
    assert "two.json exists already" in done.stderr and "unknown command /nosuch" in done.stderr
    assert "never asked" not in done.stdout + done.stderr


def test_a_saved_conversation_is_taken_up_and_is_training_data(place: Path):
    chat(place, "What is fever?\n/save kept.jsonl\n")
    went_on = chat(place, "Why?\n/save more.json\n", "--load", "kept.jsonl")
    assert went_on.returncode == 0, went_on.stderr
    assert turns(place / "more.json")[:2] == turns(place / "kept.jsonl")
    shown = medgpt("data", "kept.jsonl", "--json", cwd=place)
    assert shown.returncode == 0, shown.stderr
    missing = chat(place, "Hi\n", "--load", "absent.json")
    assert missing.returncode == 2 and "absent.json" in missing.stderr


def test_retry_and_several_lines(place: Path):
    done = chat(place, "What is fever?\n/retry\n/multi\nfirst\nsecond\n\n/save many.json\n")
    assert done.returncode == 0, done.stderr
    said = turns(place / "many.json")
    assert [text for role, text in said if role == "user"] == ["What is fever?", "first\nsecond"]


def test_a_full_context_drops_the_oldest_turns_with_a_word(place: Path):
    done = chat(place, "What is fever?\n" * 6, "--max-context", "120")
    assert done.returncode == 0, done.stderr
    assert "oldest" in done.stderr
    long = chat(place, "fever " * 300 + "\nWhat is fever?\n", "--max-context", "120")
    assert long.returncode == 0  # said, and the conversation goes on
    assert "context 120" in long.stderr and long.stdout.strip()


class Terminal:
    """A program on a pseudo-terminal: keys in, screen text out."""

    def __init__(self, words: list[str], cwd: Path):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environment({"TERM": "xterm"}),
            start_new_session=True, preexec_fn=_controlling_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, seconds: float = 60) -> str:
        """Read until `text` appears behind what was already expected."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.seen[-500:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:
                    piece = ""
                if "\x1b[6n" in piece:
                    os.write(self.master, b"\x1b[1;1R")  # a terminal tells where its cursor is
                self.seen += piece
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def _controlling_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_at_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(place: Path):
    words = command("chat", "--base-model", "model", "--max-new-tokens", "1500")
    terminal = Terminal(words, place)
    try:
        terminal.expect("/help for commands")
        terminal.expect("›")
        terminal.type(
            "感冒x\x7f怎么办\r"
        )  # the backspace takes the x, whatever the width of what stands before
        time.sleep(1.0)
        terminal.type("\x03")
        terminal.expect("stopped")
        terminal.expect("›")
        terminal.type("/save typed.json\r")
        terminal.expect("saved to typed.json")
        terminal.expect("›")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
    said = turns(place / "typed.json")
    assert said[0] == ("user", "感冒怎么办")
    assert said[1][0] == "assistant" and said[1][1]
