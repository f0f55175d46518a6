"""`medgpt chat` through a pipe and at a real terminal."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pty
import select
import subprocess
import termios
import time
from pathlib import Path

import pyte
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
    assert "context of 120" in long.stderr and long.stdout.strip()


class Terminal:
    """A program on a pseudo-terminal: keys in, screen text out."""

    def __init__(self, words: list[str], cwd: Path):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 60))
        self.screen = pyte.Screen(60, 24)
        self.screen.write_process_input = self.type  # a terminal tells where its cursor is
        self._stream = pyte.Stream(self.screen)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, start_new_session=True,
            env=environment({"TERM": "xterm", "COLUMNS": "60"}), preexec_fn=_controlling_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, seconds: float = 60) -> str:
        """Read until `text` appears behind what was already expected."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.seen[-500:]!r}"
            self._take()
        before, _, self.seen = self.seen.partition(text)
        return before

    def read(self, seconds: float) -> None:
        """Take what the program writes in so long a time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._take()

    def _take(self) -> None:
        if select.select([self.master], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):  # the program has ended
                piece = self._decoder.decode(os.read(self.master, 4096))
                self.seen += piece
                self._stream.feed(piece)

    @property
    def lines(self) -> list[str]:
        """What stands on the screen."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def _controlling_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(place: Path):
    found = Terminal(command("chat", "--base-model", "model", "--max-new-tokens", "1500"), place)
    yield found
    found.process.kill()
    os.close(found.master)


def test_at_a_terminal(place: Path, terminal: Terminal):
    terminal.expect("/help for commands")
    terminal.expect("›")

    # Wide characters, in a line longer than the screen: Left and Backspace go by characters, not by columns.
    typed = "感冒发烧三十九度怎么办呢请告诉我应该注意什么以及什么时候去医院看医生"
    terminal.type(typed + "\x1b[D" * 5 + "x\x7f\x7f")
    terminal.read(1)
    question = typed[:-6] + typed[-5:]
    assert terminal.lines[0].startswith("model ·")  # the progress bar is gone
    assert "".join(terminal.lines[1:]) == "› " + question
    assert terminal.screen.cursor.x == 2 + 2 * 28  # 28 characters of two columns behind the prompt

    # Ctrl-C stops the answer and not the program.
    terminal.type("\r")
    terminal.expect("\n")
    terminal.read(0.3)
    terminal.type("\x03")
    terminal.expect("stopped")
    terminal.expect("›")
    terminal.type("/save typed.json\r")
    terminal.expect("saved to typed.json")
    terminal.expect("›")
    terminal.type("\x1b[A\x1b[A")  # the question before, from a history in memory
    terminal.read(0.5)
    assert terminal.lines[-2:] == ["› " + question[:29], question[29:]]
    terminal.type("\x15\x04")
    assert terminal.process.wait(timeout=30) == 0
    said = turns(place / "typed.json")
    assert said[0] == ("user", question)
    assert said[1][0] == "assistant" and said[1][1]
