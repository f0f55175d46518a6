"""A row of a file as a record: which format it has, and what each of its keys means.

A row that contradicts its format is a mistake to be mended, and ends the run with its file and line. What a record
holds and nothing is made of is counted by its key.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from medicalgpt_cli.engine.data.counts import Counts, Place
from medicalgpt_cli.engine.data.exams import has_options, read_exam
from medicalgpt_cli.engine.data.fields import EMPTY, Fields, kind_of, text_of
from medicalgpt_cli.engine.data.known_keys import MEDIA, SPELLINGS
from medicalgpt_cli.engine.data.messages import Message, Role
from medicalgpt_cli.engine.data.naming import key_name, keys_found
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.reasoning import split_reasoning
from medicalgpt_cli.engine.data.tool_lists import read_tools
from medicalgpt_cli.engine.data.turns import NotUsable, Turns, media_reason
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.fields import did_you_mean

QUESTIONS = ("instruction", "prompt", "question", "query", "input", "context")  # joined in this order
ANSWERS = ("output", "response", "answer", "completion")
EXPECTED = (
    "messages, conversations, instruction + output, question + answer, prompt, text, or chosen + rejected"
)
_COMPARED = 8  # keys of a record that are compared with known ones


@dataclass(frozen=True)
class Record:
    """What a row says. `messages` ends with the answer where there is one, and else with what is to be answered."""

    kind: str
    at: str  # file:line
    source: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    id: str | None = None
    group: str | None = None
    text: str | None = None  # of plain text
    answers: tuple[str, ...] = ()  # of a comparison, in the order of `ranks`; its prompt are the messages
    ranks: tuple[float, ...] = ()  # the smaller, the better
    label: bool | None = None  # whether the answer is marked as good or as bad
    options: dict[str, str] | None = None  # letter to text, of a question with options
    key: tuple[str, ...] = ()  # the letters of the right options
    variants: tuple[str, ...] = ()  # other phrasings of the question, with the same answer


def kind_of_record(value: Any, at: str) -> str:
    """alpaca, sharegpt, messages, qa, preference, ranking, mcq, prompt or text.

    Raises:
        DataError: the row is no object, or its keys belong to no known format.
    """
    if isinstance(value, str):
        return "text"
    return _kind(_fields(value, at), value)


def _fields(value: Any, at: str, counts: Counts | None = None) -> Fields:
    if not isinstance(value, dict):
        raise DataError(
            f"a record has to be an object, this is {kind_of(value)}", f"expected keys: {EXPECTED}", at=at
        )
    return Fields(value, at, ignore=counts.ignore if counts else ())


def _kind(fields: Fields, value: Any) -> str:
    asks = any(one in fields for one in QUESTIONS)
    if "rejected" in fields:
        return "preference"
    if "ranked" in fields or (isinstance(_candidates(fields), list) and _is_ranked(fields)):
        return "ranking"
    if "messages" in fields:
        return "messages"
    if "conversations" in fields or isinstance(fields.peek("dialogue"), list):
        return "sharegpt"
    if has_options(fields):
        return "mcq"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if asks and any(one in fields for one in (*ANSWERS, "reference", "chosen")):
        return "qa"
    if "questions" in fields and "answers" in fields:
        return "qa"
    if asks:
        return "prompt"
    if "text" in fields:
        return "text"
    raise DataError(*_unknown_keys(value, fields.at), at=fields.at)


def read_record(row: Row, counts: Counts, *, used: Collection[str] = ()) -> Record | None:
    """What a row says; None where it is of no use here, which is counted.

    Args:
        used: keys that somebody else makes something of, and that so are not unused.

    Raises:
        DataError: the row contradicts its format.
    """
    if isinstance(row.value, str):
        counts.add_format(row.path, "text")
        return Record("text", row.at, row.path, text=text_of(row.value, "text", row.at))
    fields = _fields(row.value, row.at, counts)
    kind = _kind(fields, row.value)
    counts.add_format(row.path, kind)
    reading = _Reading(fields, row, counts)
    try:
        for media in MEDIA:
            if fields.peek(media):
                raise NotUsable(media_reason(fields.name(media)))
        record = reading.record(kind)
    except NotUsable as reason:
        counts.add_skip(str(reason), row.at)
        return None
    left = [one for one in fields.left if one[1] not in used]
    counts.add_keys(row.path, [*left, *reading.left], [*fields.read, *reading.read])
    return record


class _Reading:
    """Reads one record, and keeps what is left over in its turns."""

    def __init__(self, fields: Fields, row: Row, counts: Counts):
        self.fields, self.at, self.counts = fields, row.at, counts
        self.source = row.path
        self.left: list[tuple[Place, str]] = []
        self.read: list[tuple[Place, str, bool]] = []

    def record(self, kind: str) -> Record:
        fields = self.fields
        group = fields.group_value(self.counts.group) if self.counts.group else None
        identifier = fields.take("id")
        base = Record(
            kind, self.at, self.source, id=None if identifier is None else str(identifier), group=group
        )
        if kind == "text":
            return replace(base, text=fields.text("text"))
        read = {"preference": self._preference, "ranking": self._ranking, "mcq": self._exam}.get(kind)
        record = read(base) if read else replace(base, messages=tuple(self._conversation(kind)))
        if kind == "qa" and "questions" in fields:
            asked = next((one["content"] for one in reversed(record.messages) if one["role"] == "user"), "")
            others = dict.fromkeys(one for one in self._phrasings() if one != asked)
            record = replace(record, variants=tuple(others))
        record = replace(record, tools=read_tools(fields, self.left))
        if any(one["role"] == "assistant" for one in record.messages) or record.answers:
            record = self._marked(record)
        return record

    def _marked(self, record: Record) -> Record:
        """With the label and the weight that a record gives its answers."""
        label = self.fields.truth("label")
        weight = self.fields.weight() if record.kind not in ("preference", "ranking") else None
        if weight is None or weight == 1:
            return replace(record, label=label)
        messages = tuple(
            {**one, "weight": weight * one.get("weight", 1)} if one["role"] == "assistant" else one
            for one in record.messages
        )
        return replace(record, label=label, messages=messages)

    # -- conversations -------------------------------------------------------------------------------------

    def _conversation(self, kind: str) -> list[Message]:
        if kind in ("messages", "sharegpt"):
            messages = self._turns_of(self._turns_key())
            answer = self._answer() if messages and messages[-1]["role"] != "assistant" else None
            messages = [*self._history(), *messages, *([answer] if answer else [])]
        else:
            answers = [] if kind == "prompt" else self._answers()
            messages = [*self._history(), *self._asked(), *answers]
        return self._with_system(messages)

    def _asked(self) -> list[Message]:
        """The turns that are to be answered: a question, or `prompt` as a list of messages (TRL)."""
        if isinstance(self.fields.peek("prompt"), list):
            return self._turns_of("prompt")
        return [_message("user", self._question())]

    def _answers(self) -> list[Message]:
        """The answer; `completion` may be a list of messages (TRL), with calls of tools and their results."""
        if isinstance(self.fields.peek("completion"), list):
            return self._turns_of("completion")
        answer = self._answer()
        return [answer] if answer else []

    def _prompt(self) -> list[Message]:
        """What the answers of a comparison answer."""
        if "messages" in self.fields or "conversations" in self.fields:
            messages = [
                *self._history(),
                *self._turns_of(self._turns_key()),
            ]
        elif any(one in self.fields for one in QUESTIONS):
            messages = [*self._history(), *self._asked()]
        else:
            return []
        return self._with_system(messages)

    def _turns_key(self) -> str:
        return next(one for one in ("messages", "conversations", "dialogue") if one in self.fields)

    def _turns_of(self, meaning: str) -> list[Message]:
        turns = self.fields.listed(meaning)
        return self._turns(turns, self.fields.name(meaning))

    def _turns(self, turns: Any, name: str) -> list[Message]:
        read = Turns(turns, name, self.at, self.counts.ignore)
        self.left += read.left
        self.read += read.read
        return read.messages

    def _history(self) -> list[Message]:
        """Earlier turns: pairs of a question and an answer, or turns with roles."""
        history = self.fields.listed("history")
        if history in EMPTY:
            return []
        name, shape = self.fields.name("history"), "[[question, answer], …]"
        if not isinstance(history, list):
            raise DataError(f"{name} is {kind_of(history)}, not a list of pairs", shape, at=self.at)
        if all(isinstance(one, dict) for one in history):
            return self._turns(history, name)
        messages: list[Message] = []
        for pair in history:
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"an entry of {name} is not a pair", shape, at=self.at)
            question, answer = (text_of(one, name, self.at) for one in pair)
            messages += [_message("user", question), _spoken(answer)]
        return messages

    def _question(self) -> str:
        """What the user says: all parts of the question that the record has, below each other, each once."""
        if "questions" in self.fields and not any(one in self.fields for one in QUESTIONS):
            return (self._phrasings() or [""])[0]
        texts: list[str] = []
        for meaning in QUESTIONS:
            text = self.fields.text(meaning) if meaning in self.fields else None
            if text and text not in texts:
                texts.append(text)
        return "\n".join(texts)

    def _phrasings(self) -> list[str]:
        """The questions of a record that has a list of them, which may be lists themselves (Huatuo-26M)."""
        listed = self.fields.listed("questions")
        if not isinstance(listed, list):
            raise DataError(f"questions is {kind_of(listed)}, not a list", '["…", "…"]', at=self.at)
        flat = [one for some in listed for one in (some if isinstance(some, list) else [some])]
        return [text for text in (text_of(one, "a question", self.at) for one in flat) if text.strip()]

    def _answer(self) -> Message | None:
        """The answer of a record, with its reasoning; None where there is none, or it is null.

        Raises:
            DataError: it has two that differ.
        """
        fields, found = self.fields, {}
        if "answers" in fields and "questions" in fields:
            listed = fields.listed("answers")
            texts = [
                text_of(one, "an answer", self.at)
                for one in (listed if isinstance(listed, list) else [listed])
            ]
            if len(texts) > 1:
                self.counts.add_merge("the first of several answers is taken", self.at)
            found["answers"] = texts[0] if texts else None
        for meaning in (*ANSWERS, "chosen"):
            if meaning in fields:
                found[meaning] = fields.text(meaning)
        if not any(found.values()) and "reference" in fields:
            found["reference"] = fields.text("reference")
        said = {text for text in found.values() if text is not None and text.strip()}
        if len(said) > 1:
            names = " and ".join(fields.name(one) for one in found if found[one])
            raise DataError(
                f"{names} are two different answers", "--ignore KEY leaves one out, or `prompt`, chosen, rejected",
                at=self.at,
            )  # fmt: skip
        if not found:
            return None
        text = said.pop() if said else ""
        return _spoken(text, fields.text("reasoning") if text else None)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        system = self.fields.text("system")
        if not system or not system.strip():
            return messages
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        if first and first["content"].strip() == system.strip():
            return messages
        if first:
            raise DataError(
                f"{self.fields.name('system')} and the first turn are two different system messages",
                "keep one of them",
                at=self.at,
            )
        return [_message("system", system), *messages]

    # -- comparisons ---------------------------------------------------------------------------------------

    def _preference(self, base: Record) -> Record:
        """Two answers, of which one was preferred: texts, messages, or whole conversations with a common beginning."""
        fields = self.fields
        if "chosen" not in fields:
            raise DataError("a preference pair without chosen", "expected chosen and rejected", at=self.at)
        sides = [self._side(fields.listed(name), fields.name(name)) for name in ("chosen", "rejected")]
        if sides[0][0] is None and sides[1][0] is None and not self._has_prompt():
            sides = _split_texts(*(side[1] for side in sides), at=self.at)
        prompts = [prompt for prompt, _ in sides if prompt]
        chosen = sides[0][1]
        if self._has_prompt():
            asked = self._prompt_of_pair(prompts, chosen)
            prompts.append(asked)
        if not prompts:
            raise DataError(*_unknown_keys(self.fields.value, self.at), at=self.at)
        if any(_said(one) != _said(prompts[0]) for one in prompts):
            raise DataError(
                "chosen and rejected have different prompts, or another than the record",
                "both answers stand behind the same turns",
                at=self.at,
            )
        return replace(
            base, messages=tuple(prompts[-1]), answers=tuple(side[1] for side in sides), ranks=(0.0, 1.0)
        )

    def _has_prompt(self) -> bool:
        return any(one in self.fields for one in ("messages", "conversations", *QUESTIONS))

    def _prompt_of_pair(self, prompts: list[list[Message]], chosen: str) -> list[Message]:
        """The record's own prompt. `messages` may repeat the prompt and the chosen answer (UltraFeedback)."""
        fields = self.fields
        if "messages" in fields and (prompts or any(one in fields for one in QUESTIONS)):
            turns = self._turns_of("messages")
            plain = prompts[0] if prompts else [*self._history(), _message("user", self._question())]
            whole = [*plain, _spoken(chosen)]
            if _said(turns) in (_said(whole), _said(plain)):
                if any(one in fields for one in QUESTIONS):  # the prompt stands there as well
                    text = self._question() if not isinstance(fields.peek("prompt"), list) else None
                    users = [one["content"] for one in plain if one["role"] == "user"]
                    if (
                        text is not None
                        and users
                        and text.strip() not in (users[0].strip(), users[-1].strip())
                    ):
                        raise DataError("prompt and messages differ", "both say what is answered", at=self.at)
                    fields.take("prompt")
                return self._with_system(plain)
            if prompts and not any(one in fields for one in QUESTIONS):
                return self._with_system(turns)
            raise DataError(
                "messages is neither the prompt nor the prompt with the chosen answer",
                "both answers stand behind the same turns",
                at=self.at,
            )
        asked = self._prompt()
        if prompts and len(asked) == 1 and asked[0]["role"] == "user" and _said(asked) != _said(prompts[0]):
            # a conversation of several turns, whose first or last question stands beside it
            users = [one["content"].strip() for one in prompts[0] if one["role"] == "user"]
            if users and asked[0]["content"].strip() in (users[0], users[-1]):
                return prompts[0]
        return asked

    def _side(self, value: Any, name: str) -> tuple[list[Message] | None, str]:
        """(turns in front of it, the answer) of one side of a pair."""
        if value is None or isinstance(value, str):
            inline, text = split_reasoning("" if value is None else text_of(value, name, self.at))
            return None, self._judged(text, inline)
        listed = [value] if isinstance(value, dict) else value
        if not isinstance(listed, list) or not any(isinstance(one, dict) for one in listed):
            raise DataError(f"{name} is {kind_of(value)}, not text", "mend or remove this record", at=self.at)
        turns = self._turns(listed, name)
        last = turns[-1]
        if last["role"] != "assistant":
            raise DataError(
                f"{name} does not end with an answer", "its last turn is the assistant's", at=self.at
            )
        if last.get("tool_calls"):
            raise DataError(f"{name} calls a tool", "answers that are compared are texts", at=self.at)
        return turns[:-1] or None, self._judged(last["content"], last.get("reasoning"))

    def _judged(self, answer: str, reasoning: str | None) -> str:
        """What is compared of an answer: what it says, without the reasoning in front."""
        if reasoning:
            self.counts.add_merge("reasoning in front of a compared answer is left out", self.at)
        return answer

    def _ranking(self, base: Record) -> Record:
        """Several answers with scores or ranks, or in the order of their worth."""
        said, ranks = _ranked(self.fields, self.at)
        answers = [self._judged(text, inline) for inline, text in map(split_reasoning, said)]
        messages = self._prompt()
        if not messages:
            raise DataError(*_unknown_keys(self.fields.value, self.at), at=self.at)
        order = sorted(range(len(answers)), key=lambda place: ranks[place])
        return replace(
            base,
            messages=tuple(messages),
            answers=tuple(answers[place] for place in order),
            ranks=tuple(ranks[place] for place in order),
        )

    # -- multiple choice -----------------------------------------------------------------------------------

    def _exam(self, base: Record) -> Record:
        exam = read_exam(self.fields, self.source)
        if exam.counted_from is not None:
            reason = f"the right option is given as a number, counted from {exam.counted_from}"
            self.counts.add_merge(reason, self.at)
        if exam.empty_option:
            raise NotUsable("an empty option, or a single one")
        question = exam.question(self._question())
        messages = [*self._history(), _message("user", question)]
        written = next((one for one in ("output", "response", "completion") if one in self.fields), None)
        answer = (self.fields.text(written) if written else None) or (exam.answer() if exam.key else "")
        if answer.strip():
            why = self.fields.text("explanation")
            answer = f"{answer}\n{why}" if why and why.strip() else answer
            messages.append(_spoken(answer, self.fields.text("reasoning")))
        return replace(base, messages=tuple(self._with_system(messages)), options=exam.options, key=exam.key)


def _candidates(fields: Fields) -> Any:
    """The answers of a ranking, as they stand."""
    return fields.peek("responses" if "responses" in fields else "answers")


def _is_ranked(fields: Fields) -> bool:
    candidates = _candidates(fields)
    scored = bool(candidates) and all(isinstance(one, dict) for one in candidates)
    return scored or "scores" in fields or "ranks" in fields


_SCORE_KEYS = ("score", "overall_score", "rating", "reward")
_RANK_KEYS = ("rank",)
_TEXT_KEYS = ("response", "text", "content", "output", "answer", "completion")


def _ranked(fields: Fields, at: str) -> tuple[list[str], list[float]]:
    """Answers, and a number for each that is the smaller the better it is."""
    hint = '"responses": ["…", "…"] with "scores": [8, 5] or "ranks": [1, 2]; or "ranked": ["best", …]'
    if "ranked" in fields:
        listed = fields.listed("ranked")
        texts = _texts(listed, fields.name("ranked"), hint, at)
        return texts, [float(place) for place in range(len(texts))]
    meaning = "responses" if "responses" in fields else "answers"
    listed, name = fields.listed(meaning), fields.name(meaning)
    if listed and all(isinstance(one, dict) for one in listed):
        texts = [next((one[key] for key in _TEXT_KEYS if key in one), None) for one in listed]
        scores = [next((one[key] for key in _SCORE_KEYS if key in one), None) for one in listed]
        ranks = [one.get("rank") for one in listed]
        numbers = [-one for one in scores] if all(map(_is_number, scores)) else ranks
    else:
        texts = listed
        by = "scores" if "scores" in fields else "ranks"
        numbers = fields.listed(by)
        if by == "scores" and isinstance(numbers, list) and all(map(_is_number, numbers)):
            numbers = [-one for one in numbers]
    texts = _texts(texts, name, hint, at)
    if not isinstance(numbers, list) or len(numbers) != len(texts) or not all(map(_is_number, numbers)):
        raise DataError(f"{name} have no score or rank each", hint, at=at)
    return texts, [float(one) for one in numbers]


def _texts(value: Any, name: str, hint: str, at: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{name} is no list of at least two answers", hint, at=at)
    return [text_of(one, f"one of {name}", at) for one in value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


_SPEAKERS = (("\n\nHuman:", "\n\nAssistant:"), ("Human:", "Assistant:"))


def _split_texts(chosen: str, rejected: str, *, at: str) -> list[tuple[list[Message] | None, str]]:
    """Two dialogues in one text each (hh-rlhf), split at the last turn that they have in common.

    Raises:
        DataError: they are no such dialogues, or have no question in common.
    """
    sides = [_dialogue(text) for text in (chosen, rejected)]
    if not all(sides) or any(side[-1]["role"] != "assistant" for side in sides):
        if not all(text.strip() for text in (chosen, rejected)):
            return [(None, chosen), (None, rejected)]
        raise DataError(
            "a preference pair without a question",
            "expected: conversations, prompt or question, with chosen and rejected",
            at=at,
        )
    return [(side[:-1], side[-1]["content"]) for side in sides]


def _dialogue(text: str) -> list[Message]:
    """The turns of `Human: … Assistant: …`; empty where the text is none."""
    human, assistant = _SPEAKERS[0] if _SPEAKERS[0][1] in text else _SPEAKERS[1]
    text = text if text.startswith("\n\n") or human == "Human:" else f"\n\n{text}"
    if not text.startswith(human):
        return []
    messages: list[Message] = []
    for piece in text.split(human)[1:]:
        asked, *said = piece.split(assistant)
        messages.append(_message("user", asked.strip()))
        messages += [_message("assistant", one.strip()) for one in said]
    return messages


def _said(messages: list[Message]) -> list[tuple[str, str]]:
    return [(one["role"], one["content"].strip()) for one in messages if one["role"] != "system"]


def _message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def _spoken(text: str, reasoning: str | None = None) -> Message:
    """An assistant's turn, its inline reasoning apart."""
    inline, content = split_reasoning(text)
    message = _message("assistant", content)
    if reasoning or inline:
        message["reasoning"] = "\n\n".join(one for one in (reasoning, inline) if one)
    return message


def _unknown_keys(value: Any, at: str) -> tuple[str, str]:
    known = [spelling for spellings in SPELLINGS.values() for spelling in spellings]
    near = [(key_name(key, place, at), did_you_mean(str(key), known)) for place, key in enumerate(value, 1)]
    guess = "; ".join(f"did you mean {b} for {a}?" for a, b in near[:_COMPARED] if b and a != b)
    hint = guess or f"expected: {EXPECTED}; --columns question=KEY,answer=KEY gives keys their meaning"
    return f"no known format has these keys: {keys_found(value, at)}", hint
