"""Questions with options, as exams write them: which options there are, and which of them is right.

CMB has `option`, MedQA `options` with `answer_idx`, MedMCQA `opa` to `opd` with `cop`, MMLU `choices` with a number,
CMExam its options in one text. Whatever the spelling, options get letters and the answer becomes letters.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from medicalgpt_cli.engine.data.fields import Fields, kind_of, text_of
from medicalgpt_cli.engine.data.known_keys import meaning_of
from medicalgpt_cli.engine.data.readers import ReadOptions, read_again, read_as
from medicalgpt_cli.errors import DataError, MedgptError

_SINGLE = ("opa", "opb", "opc", "opd", "ope")
_SCANNED = 20_000  # records that say from where numbers count
_LINE = re.compile(r"^\s*[(（]?([A-Za-z])[)）.．、:：\s]\s*(.+?)\s*$")
_BETWEEN = re.compile(r"[\s,，、;；/|&和]+")
_FULL_WIDTH = {ord(wide): plain for wide, plain in zip("ＡＢＣＤＥＦＧＨＩＪ", "ABCDEFGHIJ", strict=True)}


@dataclass(frozen=True)
class Exam:
    options: dict[str, str]  # letter to text, in order
    key: tuple[str, ...]  # the letters of the right options, sorted; empty where the record has no answer
    empty_option: bool  # an option without text, or a single one: not to be used
    counted_from: int | None = None  # 0 or 1, where the right option is given by its number

    def question(self, text: str) -> str:
        """The question with its options below it, as it is learnt, asked and answered."""
        listed = (f"{letter}. {option}" for letter, option in self.options.items())
        return "\n".join([*([text] if text else []), *listed])

    def answer(self) -> str:
        """What is learnt as the answer: the letter, and what the option says."""
        letters, texts = ", ".join(self.key), "; ".join(self.options[letter] for letter in self.key)
        return f"{letters}. {texts}" if len(self.key) == 1 else f"{letters}: {texts}"


def has_options(fields: Fields) -> bool:
    return "options" in fields or ("opa" in fields and "opb" in fields)


def read_exam(fields: Fields, path: str) -> Exam:
    """The options and the right ones of a record.

    Raises:
        DataError: they contradict each other, or cannot be read.
    """
    options = _options(fields)
    empty = len(options) < 2 or not all(text.strip() for text in options.values())
    counted: set[int] = set()
    keys = {
        key
        for meaning in ("answer_idx", "cop", "answer")
        if (key := _key(options, fields, meaning, path, counted))
    }
    if len(keys) > 1:
        raise DataError("its answers name different options", "keep the right one", at=fields.at)
    return Exam(options, keys.pop() if keys else (), empty, min(counted, default=None))


def _options(fields: Fields) -> dict[str, str]:
    if "options" not in fields:
        single = {meaning[-1].upper(): fields.take(meaning) for meaning in _SINGLE if meaning in fields}
        return {letter: _text(text, fields.at) for letter, text in single.items() if text is not None}
    value, name = fields.listed("options"), fields.name("options")
    if isinstance(value, str):
        return _lines(value, name, fields.at)
    if isinstance(value, dict) and _is_columns(value):  # ARC's {"text": […], "label": […]}
        value = dict(zip(value["label"], value["text"], strict=False))
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        value = {_letter_of(one, fields.at): _text_in(one, fields.at) for one in value}
    elif isinstance(value, list):
        value = (
            dict(zip(ascii_uppercase, value, strict=False)) if len(value) <= len(ascii_uppercase) else None
        )
    if not isinstance(value, dict) or not value:
        raise DataError(
            f"{name} is no list of options",
            '{"A": "…", "B": "…"}, a list of texts, or a line each',
            at=fields.at,
        )
    # a table that holds objects gives each all letters that any of them has
    found = {str(letter).strip(): text for letter, text in value.items() if text is not None}
    if not all(isinstance(letter, str) and 0 < len(letter.strip()) <= 2 for letter in value):
        raise DataError(f"the names of {name} are no letters", '{"A": "…", "B": "…"}', at=fields.at)
    return {letter.upper(): _text(text, fields.at) for letter, text in found.items()}


def _is_columns(value: dict[str, Any]) -> bool:
    lists = value.keys() == {"text", "label"} and all(isinstance(one, list) for one in value.values())
    return lists and len(value["text"]) == len(value["label"])


def _lines(text: str, name: str, at: str) -> dict[str, str]:
    """Options in one text, a line each with its letter in front."""
    found = [_LINE.match(line) for line in text.splitlines() if line.strip()]
    if len(found) < 2 or not all(found):
        raise DataError(f"{name} is a text without a line for each option", "A. first\\nB. second", at=at)
    return {match[1].upper(): match[2] for match in found if match}


def _letter_of(option: dict[str, Any], at: str) -> str:
    value = next((option[key] for key in ("key", "label", "letter", "id") if key in option), None)
    if not isinstance(value, str):
        raise DataError("an option has no letter", '{"key": "A", "value": "…"}', at=at)
    return value


def _text_in(option: dict[str, Any], at: str) -> Any:
    return next((option[key] for key in ("value", "text", "content", "option") if key in option), "")


def _text(value: Any, at: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return text_of(value, "an option", at)


# -- the right ones ----------------------------------------------------------------------------------------


def _key(
    options: dict[str, str], fields: Fields, meaning: str, path: str, counted: set[int]
) -> tuple[str, ...]:
    """The letters that a field names; empty where it is missing, null or an empty list.

    Raises:
        DataError: it is not among the options, or could be several of them.
    """
    value = fields.take(meaning)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return ()
    name, found = fields.name(meaning), set()
    if meaning == "cop" and isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    for one in value if isinstance(value, list) else [value]:
        found |= set(_letters(one, options, name, path, fields.at, counted))
    return tuple(sorted(found))


def _letters(
    value: Any, options: dict[str, str], name: str, path: str, at: str, counted: set[int]
) -> list[str]:
    problem = DataError(
        f"{name} is not among the options", "expected the letter, its number or its text", at=at
    )
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{name} is {kind_of(value)}", problem.hint, at=at)
    if isinstance(value, int):
        return [_numbered(value, options, name, path, at, counted)]
    plain = value.strip().translate(_FULL_WIDTH)
    if plain.upper() in options:
        return [plain.upper()]
    same = [letter for letter, text in options.items() if text.strip() == value.strip()]
    if not same:
        same = [
            letter for letter, text in options.items() if text.strip().casefold() == value.strip().casefold()
        ]
    if len(same) > 1:
        raise DataError(f"{name} is the text of several options", "give its letter", at=at)
    if same:
        return same
    match = _LINE.match(plain)  # "A. Heart"
    if match and options.get(match[1].upper(), "").strip().casefold() == match[2].casefold():
        return [match[1].upper()]
    letters = _BETWEEN.sub("", plain).upper()
    if letters and len(set(letters)) == len(letters) and all(letter in options for letter in letters):
        return list(letters)
    if plain.isdigit():
        return [_numbered(int(plain), options, name, path, at, counted)]
    raise problem


def _numbered(number: int, options: dict[str, str], name: str, path: str, at: str, counted: set[int]) -> str:
    first = _first_number(path, meaning_of(name) or name)
    if first is None and meaning_of(name) == "cop":
        raise DataError(
            f"{name} is a number, and the file does not show whether the first option is 0 or 1",
            "write the letter instead: both ways are in use",
            at=at,
        )
    counted.add(first or 0)
    place = number - (first or 0)
    if not 0 <= place < len(options):
        raise DataError(
            f"{name} is not among the options", "expected the letter, its number or its text", at=at
        )
    return list(options)[place]


def _first_number(path: str, meaning: str) -> int | None:
    """From where the numbers of a file count: 0 or 1, and None where it does not show."""
    file = Path(path)
    if not file.is_file():
        return None
    status = file.stat()
    return _scanned(file, read_as(file), meaning, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _scanned(file: Path, _reading: ReadOptions, meaning: str, _size: int, _changed: int) -> int | None:
    """0 where a 0 stands there, 1 where the number of an option behind the last stands there."""
    beyond = False
    try:
        for row in itertools.islice(read_again(file), _SCANNED):
            if not isinstance(row.value, dict):
                continue
            fields = Fields(row.value, row.at)
            value = fields.peek(meaning)
            value = int(value) if isinstance(value, str) and value.strip().isdigit() else value
            if not isinstance(value, int) or isinstance(value, bool) or not has_options(fields):
                continue
            if value == 0:
                return 0
            beyond = beyond or value == len(_options(fields))
    except MedgptError:
        pass
    return 1 if beyond else None
