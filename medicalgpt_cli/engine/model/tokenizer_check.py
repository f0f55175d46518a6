"""Whether a tokenizer does a bounded amount of work: its patterns and replacements come with somebody's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.model import tokenizer_child
from medicalgpt_cli.engine.run import bounded
from medicalgpt_cli.errors import UnsafeRefused, UsageError

SECONDS, MEMORY = 10, 1 << 30  # of processor time and address space, for some 70 short texts
_SCRIPT = Path(tokenizer_child.__file__)
_HINT = "it comes with the model: take the tokenizer from somewhere else, or look at its tokenizer.json"
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_PLAIN = {
    "ByteLevel",
    "Digits",
    "Whitespace",
    "Sequence",
    "NFC",
    "NFKC",
    "NFD",
    "Fuse",
    "ByteFallback",
    "Strip",
}


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """
    Raises:
        UnsafeRefused: it makes a text many times as long, or takes more time or memory than a tokenizer does.
        UsageError: what it says about itself is of the wrong kind.
    """
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
        raise UsageError(f"{source}: model_max_length of the tokenizer is no length", "a number above 0")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    parts = {name: _state(getattr(backend, name)) for name in _PARTS}
    if _kinds(parts) <= _PLAIN or bounded.passed_before(_SCRIPT, parts):
        return
    try:
        problem = bounded.ask(_SCRIPT, parts, memory=MEMORY, seconds=SECONDS)
    except bounded.OutOfBounds as bound:
        problem = f"it takes more than {bound} for short texts"
    if problem:
        raise UnsafeRefused(f"{source}: the tokenizer is refused: {problem}", _HINT)
    bounded.remember(_SCRIPT, parts)


def gave_up() -> UnsafeRefused:
    """What to say where the library gives up on a text: its patterns have a limit of steps."""
    return UnsafeRefused("the tokenizer gives up on a text: its pattern takes too many steps", _HINT)


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _kinds(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["type"]} if isinstance(value.get("type"), str) else set()
        return own.union(*map(_kinds, value.values()))
    return set().union(*map(_kinds, value)) if isinstance(value, list) else set()
