"""The keys of an object by what they mean. What nobody asked for is left, to be counted as unused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from medicalgpt_cli.engine.data.counts import Place
from medicalgpt_cli.engine.data.known_keys import fold, meaning_of
from medicalgpt_cli.engine.data.naming import key_name
from medicalgpt_cli.engine.data.readers import parse_json
from medicalgpt_cli.errors import DataError

DEEPEST = 64  # objects and lists inside each other, in the parameters of a tool or the arguments of a call


class Fields:
    """An object of a record: `take` gives a value and marks its key as used, `left` are the keys that are not.

    Keys are found under any of their spellings (`known_keys.SPELLINGS`).

    Raises:
        DataError: two keys mean the same and say different things.
    """

    def __init__(
        self, value: Mapping[str, Any], at: str, place: Place = "record", ignore: Collection[str] = ()
    ):
        self.at, self.place = at, place
        self._value = value
        self._keys: dict[str, str] = {}  # meaning: key
        self._used: set[str] = set()
        numbers = {key: number for number, key in enumerate(value, 1)}
        ignored = {fold(key) for key in ignore}
        for key in value:
            meaning = meaning_of(key) if isinstance(key, str) and fold(key) not in ignored else None
            if meaning is None:
                continue
            before = self._keys.setdefault(meaning, key)
            if before == key:
                continue
            if value[before] in (None, ""):
                self._used.add(before)
                self._keys[meaning] = key
            elif value[key] in (None, "") or value[key] == value[before]:
                self._used.add(key)
            else:
                names = " and ".join(key_name(one, numbers[one], at) for one in (before, key))
                raise DataError(
                    f"{names} mean the same and say different things",
                    "--ignore KEY leaves one out, --columns gives each its meaning",
                    at=at,
                )

    @property
    def value(self) -> Mapping[str, Any]:
        """The object itself."""
        return self._value

    def group_value(self, key: str) -> str | None:
        """What `--group KEY` says about this record; None where it has no such key.

        Raises:
            DataError: the value is no text or number.
        """
        name = next((one for one in self._value if isinstance(one, str) and fold(one) == fold(key)), None)
        value = None if name is None else self._value[name]
        if name is not None:
            self._used.add(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str | int | float):
            raise DataError(
                f"the value of --group is {kind_of(value)}, not a name", "a patient's number, say", at=self.at
            )
        return str(value)

    def __contains__(self, meaning: str) -> bool:
        return meaning in self._keys

    def __getitem__(self, meaning: str) -> Any:
        """The value of a key that is there, which is used by that."""
        key = self._keys[meaning]
        self._used.add(key)
        return self._value[key]

    def take(self, meaning: str) -> Any:
        """The value under any spelling of `meaning`; None where it is not there. Its key is used by that."""
        return self[meaning] if meaning in self._keys else None

    def peek(self, meaning: str) -> Any:
        """The value, without using it."""
        return self._value[self._keys[meaning]] if meaning in self._keys else None

    def name(self, meaning: str) -> str:
        """The key as the record spells it. It is one that is known, and may stand in a message."""
        return self._keys.get(meaning, meaning)

    @property
    def left(self) -> list[tuple[Place, str]]:
        """The keys that were not used, with the place where they stand."""
        return [(self.place, str(key)) for key in self._value if key not in self._used]

    @property
    def read(self) -> list[tuple[Place, str, bool]]:
        """The keys that were used, with the place where they stand and whether their value was empty."""
        return [(self.place, key, self._value[key] in EMPTY) for key in self._value if key in self._used]

    # -- values of a kind --------------------------------------------------------------------------------------

    def text(self, meaning: str) -> str | None:
        """A text; None where it is missing or null.

        Raises:
            DataError: it is something else.
        """
        value = self.take(meaning)
        return None if value is None else text_of(value, self.name(meaning), self.at)

    def listed(self, meaning: str) -> Any:
        """A value that may stand as JSON in a text, as tables and some data sets have it.

        Raises:
            DataError: it looks like JSON and is none.
        """
        value = self.take(meaning)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        try:
            return parse_json(value)
        except DataError as problem:
            raise DataError(f"{self.name(meaning)}: {problem.message}", problem.hint, at=self.at) from None

    def truth(self, meaning: str) -> bool | None:
        """True or False; None where it is missing, null, or something else, which so stays unused."""
        value = self.peek(meaning)
        if isinstance(value, str):
            value = _TRUTH.get(value.strip().casefold())
        if isinstance(value, int | float) and value in (0, 1):
            self._used.add(self._keys[meaning])
            return bool(value)
        return None

    def weight(self) -> float | None:
        """The weight of a loss: a number of at least 0, or whether to learn at all. None where there is none.

        Raises:
            DataError: it is no such number.
        """
        value = self.take("weight")
        if value is None or value == "":
            return None
        if isinstance(value, str):
            try:
                value = float(_TRUTH.get(value.strip().casefold(), value))
            except ValueError:
                value = math.nan
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise DataError(
                f"{self.name('weight')} is no number of at least 0",
                "1 learns the answer, 0 leaves it as context",
                at=self.at,
            )
        return float(value)


EMPTY: tuple[Any, ...] = (None, "", [], {})
_TRUTH = {
    "true": True,
    "false": False,
    "1": True,
    "0": False,
    "yes": True,
    "no": False,
    "1.0": True,
    "0.0": False,
}
_TRUTH |= {"是": True, "否": False, "好": True, "差": False}


def text_of(value: Any, name: str, at: str) -> str:
    """
    Raises:
        DataError: the value of `name` is no text.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind_of(value)}, not text", "mend or remove this record", at=at)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{name} holds half a character (a lone surrogate)", "mend or remove this record", at=at
        ) from None
    return value


def object_of(value: dict[str, Any], name: str, at: str) -> dict[str, Any]:
    """An object of any keys, as the parameters of a tool and the arguments of a call are: it can be written as JSON.

    Raises:
        DataError: a text in it holds half a character, a number is infinite, or it is nested too deeply.
    """
    layer: list[Any] = [value]
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for one in layer:
            if isinstance(one, dict):
                inside += [text_of(key, f"a key in {name}", at) for key in one]
                inside += one.values()
            elif isinstance(one, list | tuple):
                inside += one
            elif isinstance(one, str):
                text_of(one, f"a text in {name}", at)
            elif isinstance(one, float) and not math.isfinite(one):
                raise DataError(f"a number in {name} is not finite", "mend or remove this record", at=at)
        if not inside:
            return value
        layer = inside
    raise DataError(
        f"objects and lists in {name} are more than {DEEPEST} deep inside each other",
        "mend or remove this record",
        at=at,
    )


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
