"""One declaration an option: its default, help text and bounds.

A field made by `opt` is the flag, the recipe key, the environment variable, the row of the report
and the line of the reference page. Standard library only, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from medicalgpt_cli.errors import UsageError

_LONGEST_WORD = 200


@dataclass(frozen=True)
class Option:
    """What a settings field says about itself beyond its name, type and default."""

    help: str
    min: float | None = None
    max: float | None = None
    above: float | None = None  # exclusive lower bound
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # further flags, with their dashes
    negative: str | None = None  # the flag that sets a bool to False, when it is worth having
    metavar: str | None = None
    argument: bool = False  # a positional argument, not a flag
    hidden: bool = False


def opt(default: Any, help: str, **about: Any) -> Any:
    """Declare a settings field. `default` may be a tuple for a flag that can be repeated."""
    return field(default=default, metadata={"option": Option(help, **about)})


def options_of(settings: Any) -> dict[str, tuple[dataclasses.Field, Option]]:
    """The options of a settings class or instance: name to field and declaration, in declared order."""
    return {
        one.name: (one, one.metadata["option"])
        for one in dataclasses.fields(settings)
        if "option" in one.metadata
    }


def flag_of(name: str) -> str:
    """The flag of a field: `base_model` is `--base-model`."""
    return "--" + name.replace("_", "-")


def base_type(settings_class: type, name: str) -> tuple[type, bool, bool]:
    """The plain type of a field, whether it may be None, and whether it can be repeated."""
    hint = _hints(settings_class)[name]
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional, hint = True, members[0]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], optional, True
    return hint, optional, False


@functools.cache
def _hints(settings_class: type) -> dict[str, Any]:
    return typing.get_type_hints(settings_class)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The nearest known word, or None; a long word, which takes long to compare, is like none of them."""
    if len(word) > _LONGEST_WORD:
        return None
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def check_bounds(settings: Any) -> None:
    """Check every field against its declaration.

    Raises:
        UsageError: naming the flag, the value and what is allowed.
    """
    for name, (_, about) in options_of(settings).items():
        value = getattr(settings, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                _check_value(flag_of(name), one, about)


def _check_value(flag: str, value: Any, about: Option) -> None:
    if about.choices and value not in about.choices:
        near = did_you_mean(str(value), about.choices)
        hint = f"did you mean {near}?" if near else f"one of: {', '.join(about.choices)}"
        raise UsageError(f"{flag} {value}: not one of {', '.join(about.choices)}", hint)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    allowed = _allowed(about)
    too_small = about.min is not None and value < about.min
    too_small = too_small or (about.above is not None and value <= about.above)
    if too_small or (about.max is not None and value > about.max) or value != value:
        raise UsageError(f"{flag} {value}: out of range", f"allowed: {allowed}")


def _allowed(about: Option) -> str:
    parts = []
    if about.above is not None:
        parts.append(f"above {about.above:g}")
    if about.min is not None:
        parts.append(f"at least {about.min:g}")
    if about.max is not None:
        parts.append(f"at most {about.max:g}")
    return ", ".join(parts) or "a number"
