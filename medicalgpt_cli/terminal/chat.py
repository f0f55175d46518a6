"""Talking to a model in the terminal: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import signals
from medicalgpt_cli.errors import MedgptError
from medicalgpt_cli.settings.stages import ChatSettings, InferSettings
from medicalgpt_cli.terminal.console import messages, print_error

if TYPE_CHECKING:
    from medicalgpt_cli.engine.data.tools import Delta
    from medicalgpt_cli.engine.generation.conversation import Conversation, Deltas

_HELP = """\
/system TEXT   set the system prompt (no text: remove it)     /reset        begin anew
/save FILE     write the conversation as JSON                 /load FILE    take one up again
/retry         another answer to the last question            /multi        a question of several lines
/thoughts      what was thought before the last answer        /result TEXT  what the called tool gave
/help          this list                                      /exit         leave (also Ctrl-D)
Ctrl-C stops an answer. A line that begins with // is a question that begins with /."""
_COMMANDS = (
    "/system",
    "/reset",
    "/save",
    "/load",
    "/retry",
    "/multi",
    "/thoughts",
    "/result",
    "/help",
    "/exit",
)


def chat(settings: ChatSettings, observer: Observer) -> None:
    """A conversation until the input ends. Typed at a terminal, or a question a line from a pipe."""
    from medicalgpt_cli.engine.generation.conversation import Conversation

    conversation = Conversation.open(settings, observer)
    if settings.load:
        _taken_up(conversation, settings.load)
    if _at_terminal():
        _dim(f"{conversation.label} · /help for commands · Ctrl-D to leave")
    lines = _lines("› ")
    for line in lines:
        with _told():
            if _handle(conversation, line, lines):
                return


def ask_single_questions(settings: InferSettings, observer: Observer) -> None:
    """Each line is a question of its own; nothing is remembered."""
    from medicalgpt_cli.engine.generation.conversation import Conversation

    conversation = Conversation.open(settings, observer)
    for line in _lines("? "):
        with _told():
            if line.strip():
                _answer(conversation, conversation.answer_alone(line))


def _handle(conversation: Conversation, line: str, lines: Iterator[str]) -> bool:
    """Carry out a line; True to leave."""
    if not line.startswith("/") or line.startswith("//"):
        _ask(conversation, line.removeprefix("/"))
        return False
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/exit":
        return True
    if word == "/help":
        _dim(_HELP)
    elif word == "/system":
        conversation.system = rest or None
        _dim("system prompt set" if rest else "system prompt removed")
    elif word == "/reset":
        conversation.reset()
        _dim("a new conversation")
    elif word in ("/save", "/load"):
        _file(conversation, word, rest)
    elif word == "/retry":
        pieces = conversation.retry()
        if pieces is None:
            _dim("there is no question to answer again")
        else:
            _answer(conversation, pieces)
    elif word == "/thoughts":
        _dim(_harmless(conversation.thoughts) or "nothing was thought before the last answer")
    elif word == "/result":
        pieces = conversation.give_result(rest)
        if pieces is None:
            _show_calls(conversation)
        else:
            _answer(conversation, pieces)
    elif word == "/multi":
        _dim("end with an empty line")
        _ask(conversation, "\n".join(_until_blank(lines)))
    else:
        from medicalgpt_cli.settings.fields import did_you_mean

        near = did_you_mean(word, _COMMANDS)
        _dim(f"unknown command {word}" + (f"; did you mean {near}?" if near else "; /help lists them"))
    return False


def _file(conversation: Conversation, word: str, name: str) -> None:
    if not name:
        _dim(f"{word} needs a file name")
    elif word == "/save":
        conversation.save(Path(name).expanduser())
        _dim(f"saved to {name}")
    else:
        _taken_up(conversation, Path(name).expanduser())
        _dim(f"{len(conversation.turns)} messages taken up from {name}")


def _taken_up(conversation: Conversation, path: Path) -> None:
    for line in conversation.load(path):
        _dim(line)
    if conversation.tools:
        _dim(f"with tools that may be called: {', '.join(one['name'] for one in conversation.tools)}")
    _show_calls(conversation)


def _show_calls(conversation: Conversation) -> None:
    """The calls that wait for a result."""
    for number, call in enumerate(conversation.open_calls):
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        word = " · /result TEXT says what it gave" if number == 0 else ""
        _dim(_harmless(f"→ {call['name']}({arguments}){word}"))


def _ask(conversation: Conversation, question: str) -> None:
    if question.strip():
        _answer(conversation, conversation.ask(question))


class _Thoughts:
    """A line in place of what is thought before an answer: that it goes on, then how long it was."""

    def __init__(self) -> None:
        self.tokens, self._began, self._over = 0, False, False
        self._live = messages().is_terminal

    def add(self, deltas: list[Delta]) -> None:
        """The deltas of one token; up to the first that is no thought they count as thought."""
        if any(one.kind != "reasoning" for one in deltas):
            self.end()
        if self._over:
            return
        self.tokens += 1
        if deltas and not self._began:
            self._began = True
            if self._live:
                messages().print("thinking …", style="dim", end="")

    def end(self) -> None:
        if self._began and not self._over:
            if self._live:
                messages().file.write("\r\x1b[2K")
            _dim(f"thought · {self.tokens} tokens · /thoughts shows them")
        self._over = True


def _answer(conversation: Conversation, pieces: Deltas) -> None:
    """Print an answer as it comes, then what it took. Ctrl-C ends the answer and keeps what was said."""
    from medicalgpt_cli.engine.generation.answer_reader import content_of

    stopped = False
    show = _harmless if sys.stdout.isatty() else str

    def stop(_number: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True

    thoughts = _Thoughts()
    before = signal.signal(signal.SIGINT, stop)
    try:
        for deltas in pieces:
            thoughts.add(deltas)
            sys.stdout.write(show(content_of(deltas)))
            sys.stdout.flush()
            if stopped:
                break
    finally:
        pieces.close()
        thoughts.end()
        signal.signal(signal.SIGINT, before)
        sys.stdout.write("\n")
        sys.stdout.flush()
    _show_calls(conversation)
    if conversation.dropped:
        _dim(f"the context is full: the oldest {conversation.dropped} messages were left out")
    last = conversation.last
    if last is not None:
        speed = last.completion_tokens / max(conversation.seconds, 1e-9)
        ending = (
            " · stopped"
            if stopped
            else " · cut at --max-new-tokens"
            if last.finish_reason == "length"
            else ""
        )
        _dim(f"{last.completion_tokens} tokens · {speed:.1f} tokens/s{ending}")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What goes wrong with one line is said, and the conversation goes on."""
    try:
        yield
    except MedgptError as error:
        print_error(error)


def _harmless(text: str) -> str:
    """Text that cannot drive the terminal, whatever the model says."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _lines(prompt: str) -> Iterator[str]:
    return _typed(prompt) if _at_terminal() else _piped()


def _typed(prompt: str) -> Iterator[str]:
    """Lines typed at a terminal, with editing and a history that lives in memory only."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    session: PromptSession[str] = PromptSession(history=InMemoryHistory())
    while True:
        try:
            line = session.prompt(prompt)
        except KeyboardInterrupt as stop:
            if getattr(stop, "exit_code", 130) != 130:
                raise  # no Ctrl-C
            signals.forget()
            _dim("Ctrl-D or /exit to leave")
            continue
        except EOFError:
            return
        yield line


def _piped() -> Iterator[str]:
    """Lines of a pipe. Both ends speak UTF-8, whatever the locale."""
    from medicalgpt_cli.engine.data.readers import text_lines

    sys.stdout.reconfigure(encoding="utf-8")
    for _, line in text_lines(sys.stdin.buffer, "<stdin>"):
        yield line


def _until_blank(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.strip():
            return
        yield line


def _dim(text: str) -> None:
    messages().print(text, style="dim", markup=False, highlight=False)
