"""Rows to conversations: which format a row has, what its turns are, and what is done about odd ones.

A row that contradicts its format ends the run with its file and line: it is a mistake to be mended.
A row from which there is nothing to learn is skipped, counted and shown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from medicalgpt_cli.engine.data.naming import key_name, keys_found, role_name
from medicalgpt_cli.engine.data.readers import (
    AS_FOUND,
    ReadOptions,
    Row,
    expand_sources,
    is_document,
    is_text,
    read_rows,
    unit_of,
)
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.fields import did_you_mean

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(TypedDict):
    """A call of a tool that an assistant makes. `arguments` is what the tool gets, an object."""

    name: str
    arguments: dict[str, Any]
    id: NotRequired[str]  # by which a tool's turn says what it answers


class Message(TypedDict):
    """A turn. What is not said stands not there: an assistant's turn without reasoning has no key `reasoning`."""

    role: Role
    content: str
    reasoning: NotRequired[str]  # what an assistant thought in front of its answer, without marks around it
    tool_calls: NotRequired[list[ToolCall]]  # that an assistant makes behind its content
    name: NotRequired[str]  # of a tool's turn: the tool that answers
    tool_call_id: NotRequired[str]  # of a tool's turn: the call that it answers
    weight: NotRequired[float]  # of an assistant's turn: its loss is multiplied by it, 0 is context only


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    at: str  # file:line
    id: str | None = None
    source: str = ""
    tools: tuple[
        dict[str, Any], ...
    ] = ()  # JSON Schema of each function that may be called: name, description, parameters
    group: str | None = None  # what belongs together (a patient, a document), of `--group`


@dataclass
class Counts:
    """What happened to the rows: each skipped, merged or cut one by its reason, with a few places of each."""

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    merged: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    tokens_cut: int = 0
    formats: dict[str, str] = field(default_factory=dict)  # file: format
    notices: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def used(self) -> int:
        """Rows that are not skipped."""
        return self.read - sum(self.skipped.values())

    def add_skip(self, reason: str, at: str) -> None:
        """A row (or a conversation that was used until now) is left out."""
        self.skipped[reason] += 1
        self._place(reason, at)

    def add_merge(self, reason: str, at: str) -> None:
        self.merged[reason] += 1
        self._place(reason, at)

    def add_truncation(self, reason: str, at: str, tokens: int) -> None:
        self.truncated[reason] += 1
        self.tokens_cut += tokens
        self._place(reason, at)

    def _place(self, reason: str, at: str) -> None:
        if len(self.places[reason]) < 5:
            self.places[reason].append(at)

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "used": self.used,
            "skipped": dict(self.skipped),
            "merged": dict(self.merged),
            "truncated": dict(self.truncated),
            "tokens_cut": self.tokens_cut,
            "formats": self.formats,
            "notices": self.notices,
            "places": dict(self.places),
        }


_ROLES: dict[str, Role] = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
_QUESTIONS = ("question", "query", "ask", "prompt", "instruction", "input")
_ANSWERS = ("answer", "response", "output", "reference", "response_chosen")
_GUESSED = 8  # keys of a record that are compared with known ones
_EXPECTED = (
    "messages, conversations, instruction + output, question + answer, prompt, text, or chosen + rejected"
)


def detect_format(value: Any, at: str) -> str:
    """alpaca, sharegpt, messages, qa, preference, mcq, prompt or text.

    Raises:
        DataError: the row is no object, or its keys belong to no known format.
    """
    if isinstance(value, str):
        return "text"
    if not isinstance(value, dict):
        raise DataError(
            f"a record has to be an object, this is {_kind(value)}", f"expected keys: {_EXPECTED}", at=at
        )
    keys = set(value)
    if "rejected" in keys or "response_rejected" in keys:
        return "preference"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys or "conversation" in keys:
        return "sharegpt"
    if "instruction" in keys and "output" in keys:
        return "alpaca"
    if "options" in keys:
        return "mcq"
    if keys & set(_QUESTIONS) and keys & set(_ANSWERS) and _pair_keys(value) is not None:
        return "qa"
    if keys & set(_QUESTIONS):
        return "prompt"
    if "text" in keys:
        return "text"
    raise DataError(*_unknown_keys(value, at), at=at)


def load_conversations(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    *,
    max_samples: int | None = None,
    reading: ReadOptions = AS_FOUND,
) -> list[Conversation]:
    """Conversations with at least one answer, of all sources in order; what is left out is counted.

    Raises:
        DataError: a row contradicts its format, or nothing is left.
    """
    found: list[Conversation] = []
    for row in rows_of(sources, counts, observer, reading=reading):
        if max_samples is not None and len(found) >= max_samples:
            break
        counts.read += 1
        conversation = to_conversation(row, counts)
        if conversation is not None:
            found.append(conversation)
    if not found:
        raise DataError(f"{', '.join(sources)}: no conversation to learn from", _why_nothing(counts))
    _warn_about_duplicates(found, counts)
    return found


def load_prompts(
    sources: Sequence[str], counts: Counts, observer: Observer, *, reading: ReadOptions = AS_FOUND
) -> list[Conversation]:
    """What a model is to answer: each row up to its last user turn.

    Raises:
        DataError: a row contradicts its format, or nothing is left.
    """
    found = []
    for row in rows_of(sources, counts, observer, reading=reading):
        counts.read += 1
        messages, identifier = messages_of(row, counts)
        last = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=None)
        if last is None or not messages[last]["content"].strip():
            counts.add_skip("no question", row.at)
            continue
        found.append(Conversation(tuple(messages[: last + 1]), row.at, identifier, row.path))
    if not found:
        raise DataError(f"{', '.join(sources)}: no prompt", _why_nothing(counts))
    return found


@dataclass(frozen=True)
class Document:
    text: str
    at: str  # file:line


def iterate_texts(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    *,
    text_unit: str = "auto",
    reading: ReadOptions = AS_FOUND,
) -> Iterator[Document]:
    """Documents of text files and of `{"text": …}` records as a stream; empty ones are counted.

    Args:
        text_unit: what a document of a text file is: "line", "block" (between blank lines), "file", or
            "auto": blocks where the file has blank lines, else lines.

    Raises:
        DataError: a record has no text, or nothing is found.
    """
    any_found = False
    for row in rows_of(sources, counts, observer, text_unit=text_unit, with_documents=True, reading=reading):
        counts.read += 1
        kind = detect_format(row.value, row.at)
        if kind != "text":
            raise DataError(f"a {kind} record among plain text", "one kind of data at a time", at=row.at)
        counts.formats.setdefault(row.path, kind)
        value = row.value if isinstance(row.value, str) else row.value["text"]
        if value is None or not _text(value, "text", row.at).strip():
            counts.add_skip("no text", row.at)
        else:
            any_found = True
            yield Document(value, row.at)
    if not any_found:
        raise DataError(f"{', '.join(sources)}: no text", _why_nothing(counts))


def load_texts(
    sources: Sequence[str], counts: Counts, observer: Observer, *, reading: ReadOptions = AS_FOUND
) -> list[str]:
    """All documents of `iterate_texts` at once."""
    return [document.text for document in iterate_texts(sources, counts, observer, reading=reading)]


def first_format(sources: Sequence[str], *, reading: ReadOptions = AS_FOUND) -> str:
    """The format of the first record, which decides what the sources are for; text where all are documents."""
    files, _ = expand_sources(sources, with_documents=True)
    for file in files:
        if not is_document(file):
            for row in read_rows(file, reading=reading):
                return detect_format(row.value, row.at)
    if any(is_document(file) for file in files):
        return "text"
    raise DataError(f"{', '.join(sources)}: no record", "is it the right file?")


def to_conversation(row: Row, counts: Counts) -> Conversation | None:
    """The conversation of a row; None where there is nothing to learn, which is counted."""
    if detect_format(row.value, row.at) in ("prompt", "mcq"):
        keys = keys_found(row.value, row.at)
        raise DataError(f"no answer to learn from; keys found: {keys}", f"expected: {_EXPECTED}", at=row.at)
    messages, identifier = messages_of(row, counts)
    messages = join_same_role(messages, row.at, counts)
    while messages and messages[-1]["role"] != "assistant":
        if any(one["role"] == "assistant" for one in messages):
            counts.add_merge("turns behind the last answer left out", row.at)
        messages = messages[:-1]
    if not messages:
        counts.add_skip("no answer to learn from", row.at)
        return None
    if not any(one["role"] == "user" for one in messages):
        counts.add_skip("no question in front of the answer", row.at)
        return None
    if any(one["role"] == "assistant" and not one["content"].strip() for one in messages):
        counts.add_skip("an empty answer", row.at)
        return None
    if any(one["role"] == "user" and not one["content"].strip() for one in messages):
        counts.add_skip("an empty question", row.at)
        return None
    return Conversation(tuple(messages), row.at, identifier, row.path)


def messages_of(row: Row, counts: Counts) -> tuple[list[Message], str | None]:
    """The turns of a row in the order they were said, and its id.

    Raises:
        DataError: the row contradicts its format.
    """
    value, at = row.value, row.at
    kind = detect_format(value, at)
    known = counts.formats.setdefault(row.path, kind)
    if kind not in known.split(" + "):
        counts.formats[row.path] = f"{known} + {kind}"
    if kind == "text":
        raise DataError(
            "plain text has no questions and answers",
            "plain text is for pretraining; here conversations",
            at=at,
        )
    readers = {
        "messages": _from_messages,
        "sharegpt": _from_sharegpt,
        "alpaca": _from_alpaca,
        "qa": _from_pair,
        "prompt": _from_prompt,
        "preference": _from_preference,
        "mcq": _from_choice,
    }
    messages = readers[kind](value, at)
    identifier = value.get("id")
    return messages, None if identifier is None else str(identifier)


# -- formats -----------------------------------------------------------------------------------------------


def _from_messages(value: dict[str, Any], at: str) -> list[Message]:
    messages = _turns(value["messages"], "messages", "role", "content", at)
    messages = _with_system(value, messages, at)
    reference = next((value[key] for key in ("reference", "answer") if value.get(key)), None)
    if reference is not None and messages and messages[-1]["role"] == "user":
        messages.append(_message("assistant", reference, "reference", at))
    return messages


def _from_sharegpt(value: dict[str, Any], at: str) -> list[Message]:
    key = "conversations" if "conversations" in value else "conversation"
    return _with_system(value, _turns(value[key], key, "from", "value", at), at)


def _from_alpaca(value: dict[str, Any], at: str) -> list[Message]:
    history = value.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history is {_kind(history)}, not a list of pairs", "[[question, answer], …]", at=at)
    messages: list[Message] = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("a history entry is not a pair", "[[question, answer], …]", at=at)
        messages += [_message("user", pair[0], "history", at), _message("assistant", pair[1], "history", at)]
    question = _text(value["instruction"], "instruction", at)
    more = value.get("input")
    if more is not None and _text(more, "input", at):
        question = f"{question}\n{more}" if question else more
    messages += [
        _message("user", question, "instruction", at),
        _message("assistant", value["output"], "output", at),
    ]
    return _with_system(value, messages, at)


def _from_pair(value: dict[str, Any], at: str) -> list[Message]:
    question, answer = _pair_keys(value)
    messages = [
        _message("user", value[question], question, at),
        _message("assistant", value[answer], answer, at),
    ]
    return _with_system(value, messages, at)


def _from_prompt(value: dict[str, Any], at: str) -> list[Message]:
    key = next(key for key in _QUESTIONS if key in value)
    return _with_system(value, [_message("user", value[key], key, at)], at)


def _from_preference(value: dict[str, Any], at: str) -> list[Message]:
    """The chosen answer of a preference pair is what is worth learning."""
    chosen = answer_keys(value, at)[0]
    value = with_plain_answers(value, at)
    return [*preference_prompt(value, at), _message("assistant", value[chosen], chosen, at)]


def answer_keys(value: dict[str, Any], at: str) -> tuple[str, str]:
    """The names under which a preference pair has its better and its worse answer."""
    for pair in (("chosen", "rejected"), ("response_chosen", "response_rejected")):
        missing = [name for name in pair if name not in value]
        if len(missing) == 1:
            raise DataError(
                f"a preference pair without {missing[0]}", f"expected {' and '.join(pair)}", at=at
            )
        if not missing:
            return pair
    raise DataError(
        f"no preference pair; keys found: {keys_found(value, at)}",
        "expected: conversations, prompt or question, with chosen and rejected",
        at=at,
    )


def with_plain_answers(value: dict[str, Any], at: str) -> dict[str, Any]:
    """A preference pair with texts as answers, where it has messages: one, or a list that may begin with the prompt.

    Raises:
        DataError: a list does not end with an answer, or the prompts of the two sides, or of the record, differ.
    """
    names = answer_keys(value, at)
    value = {**value}
    if isinstance(value.get("prompt"), list):
        value["messages"] = value.pop("prompt")
    prompts: dict[str, list[Message]] = {}
    for name in names:
        said = value[name]
        listed = [said] if isinstance(said, dict) else said
        if not isinstance(listed, list) or not any(isinstance(one, dict) for one in listed):
            continue
        turns = _turns(listed, name, "role", "content", at)
        if turns[-1]["role"] != "assistant":
            raise DataError(f"{name} does not end with an answer", "its last turn is the assistant's", at=at)
        value[name] = turns[-1]["content"]
        if turns[:-1]:
            prompts[name] = turns[:-1]
    if not prompts:
        return value
    if any(key in value for key in ("conversations", "conversation", "messages", "instruction", *_QUESTIONS)):
        prompts["the record"] = preference_prompt(value, at)
    first, *others = prompts
    for other in others:
        if prompts[other] != prompts[first]:
            raise DataError(
                f"{first} and {other} have different prompts",
                "both answers stand behind the same turns",
                at=at,
            )
    return {**value, "messages": prompts[first]}


def preference_prompt(value: dict[str, Any], at: str) -> list[Message]:
    """What both answers of a pair answer; several turns are kept."""
    if "conversations" in value or "conversation" in value:
        return _from_sharegpt(value, at)
    if "messages" in value:
        return _with_system(value, _turns(value["messages"], "messages", "role", "content", at), at)
    if "instruction" in value:
        return _from_alpaca({**value, "output": ""}, at)[:-1]
    if not any(key in value for key in _QUESTIONS):
        raise DataError(*_unknown_keys(value, at), at=at)
    return _from_prompt(value, at)


def _from_choice(value: dict[str, Any], at: str) -> list[Message]:
    """A question with options; its answer is not a conversation."""
    options = value["options"]
    if not isinstance(options, dict) or not all(isinstance(one, str) for one in options.values()):
        raise DataError("options has to be an object of texts", '{"A": "…", "B": "…"}', at=at)
    listed = "\n".join(f"{key}. {text}" for key, text in options.items())
    return [_message("user", f"{_text(value.get('question'), 'question', at)}\n{listed}", "question", at)]


def _turns(turns: Any, name: str, role_key: str, text_key: str, at: str) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(
            f"{name} is {_kind(turns)}, not a list of turns",
            f'[{{"{role_key}": …, "{text_key}": …}}, …]',
            at=at,
        )
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise DataError(
                f"turn {number} is {_kind(turn)}, not an object",
                f'{{"{role_key}": …, "{text_key}": …}}',
                at=at,
            )
        # both spellings occur in the wild, also mixed
        role = turn.get(role_key, turn.get("role", turn.get("from")))
        keys = [key for key in (text_key, "content", "value") if key in turn]
        if role is None or not keys:
            raise DataError(
                f"turn {number} has no {role_key if role is None else text_key}",
                f"keys found: {keys_found(turn, at)}",
                at=at,
            )
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise DataError(*_unknown_role(number, role, at), at=at)
        found.append(_message(_ROLES[role.lower()], turn[keys[0]], f"turn {number}", at))
    return found


def _with_system(value: dict[str, Any], messages: list[Message], at: str) -> list[Message]:
    system = value.get("system") or value.get("system_prompt")
    if system and _text(system, "system", at).strip() and not (messages and messages[0]["role"] == "system"):
        return [_message("system", system, "system", at), *messages]
    return messages


def _pair_keys(value: dict[str, Any]) -> tuple[str, str] | None:
    question = next((key for key in _QUESTIONS if key in value), None)
    answer = next((key for key in _ANSWERS if key in value and key != question), None)
    return (question, answer) if question and answer else None


def _message(role: Role, content: Any, name: str, at: str) -> Message:
    return {"role": role, "content": _text(content, name, at)}


def _text(value: Any, name: str, at: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_kind(value)}, not text", "mend or remove this record", at=at)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{name} holds half a character (a lone surrogate)", "mend or remove this record", at=at
        ) from None
    return value


# -- odd rows ----------------------------------------------------------------------------------------------


def join_same_role(messages: Iterable[Message], at: str, counts: Counts) -> list[Message]:
    """Two user turns in a row are one; so are two answers. A system message counts only in front."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {
                "role": message["role"],
                "content": f"{joined[-1]['content']}\n{message['content']}",
            }
            counts.add_merge(f"two {message['role']} turns in a row joined", at)
        else:
            joined.append(dict(message))
    return joined


def rows_of(
    sources: Sequence[str],
    counts: Counts,
    observer: Observer,
    *,
    text_unit: str = "line",
    with_documents: bool = False,
    reading: ReadOptions = AS_FOUND,
) -> Iterator[Row]:
    """The rows of all sources in order.

    Args:
        with_documents: whether documents (`.docx`, …) are read; where not, those of a folder are left out and counted.

    Raises:
        DataError: what is wrong with a file, or a document is named where it is of no use.
    """
    files, ignored = expand_sources(sources, counts.notices, with_documents=with_documents)
    if ignored:
        word = "of unknown kind" if with_documents else "that hold no records"
        counts.notices.append(
            f"{len(ignored)} files {word} in the folders are left out, such as {ignored[0]}"
        )
    for file in files:
        if is_document(file) and not with_documents:
            raise DataError(
                "a document has no questions and answers",
                "its text is for pretrain and vocabulary",
                at=str(file),
            )
        task = f"reading {getattr(file, 'name', file)}"
        observer.on_task_start(task, None, "rows")
        number = 0
        if is_text(file):
            unit = unit_of(file, reading) if text_unit == "auto" else text_unit
            counts.formats[str(file)] = f"text, a document a {unit}"
        else:
            unit = "line"
        for number, row in enumerate(
            read_rows(file, text_unit=unit, notices=counts.notices, reading=reading), 1
        ):
            if number % 1000 == 0:
                observer.on_task_advance(task, number)
            yield row
        observer.on_task_end(task)
        if number == 0:
            raise DataError(
                f"{getattr(file, 'name', file)}: the file holds no record", "is it the right file?"
            )


def _warn_about_duplicates(found: Sequence[Conversation], counts: Counts) -> None:
    distinct = len({tuple((one["role"], one["content"]) for one in c.messages) for c in found})
    if distinct < len(found):
        counts.notices.append(f"{len(found) - distinct} of {len(found)} conversations repeat another one")


def _why_nothing(counts: Counts) -> str:
    if counts.skipped:
        return "; ".join(f"{number} skipped: {reason}" for reason, number in counts.skipped.most_common(3))
    return "the files are empty"


def _unknown_role(number: int, role: Any, at: str) -> tuple[str, str]:
    known = f"known roles: {', '.join(_ROLES)}"
    if not isinstance(role, str):
        return f"the role of turn {number} is {_kind(role)}, not text", known
    name, near = role_name(role, at), did_you_mean(role.lower(), _ROLES)
    hint = f"did you mean {near}?" if near else known
    return f"turn {number} has {f'the unknown role {name}' if name else 'an unknown role'}", hint


def _unknown_keys(value: dict[str, Any], at: str) -> tuple[str, str]:
    known = (
        "messages",
        "conversations",
        "instruction",
        "output",
        "question",
        "answer",
        "prompt",
        "text",
        "chosen",
    )
    near = [(key_name(key, place, at), did_you_mean(str(key), known)) for place, key in enumerate(value, 1)]
    guess = "; ".join(f"did you mean {b} for {a}?" for a, b in near[:_GUESSED] if b and a != b)
    return f"no known format has these keys: {keys_found(value, at)}", guess or f"expected: {_EXPECTED}"


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
