"""Try out how a tokenizer cuts text: `tokenizer_child.py` within limits, its parts on standard input.

A script of its own, that imports nothing of medgpt (engine/run/bounded.py). The vocabulary stays outside: what can
take any time or memory is what stands in front of it.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from typing import Any

_GROWTH, _BEYOND = 32, 1_000  # a text may become so many times as long, and so many characters beyond
_RUNS = (
    *("a", "A", "0", " ", "\n", "\t", ".", "!", "'", "-", "_", "x", "é", "中", "。", "ａ", "🙂"),
    *("aB", "a1", "a ", " a", "\r\n"),
)


def refusal(parts: dict[str, Any]) -> str | None:
    """Why a tokenizer is not to be used; None where nothing is wrong."""
    if problem := _written_down(parts):
        return problem
    from tokenizers import Tokenizer

    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
        **parts, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(content))
    for text in _texts(parts):
        if tokenizer.normalizer is not None:
            grown = len(tokenizer.normalizer.normalize_str(text))
            if grown > _GROWTH * len(text) + _BEYOND:
                return f"its normalizer makes {grown:,} characters of {len(text)}"
        try:
            tokenizer.encode(text, add_special_tokens=False)
        except BaseException as problem:
            if type(problem).__name__ == "PanicException":
                return "its pattern takes too many steps for some texts"
            raise
    return None


def _texts(parts: dict[str, Any]) -> Iterator[str]:
    for run in _RUNS:
        for end in ("", "!", "z"):
            yield run * 200 + end
    yield from (
        one["pattern"]["String"] * 3
        for one in _objects(parts)
        if isinstance(one.get("pattern"), dict) and isinstance(one["pattern"].get("String"), str)
    )


def _written_down(parts: dict[str, Any]) -> str | None:
    """What its parts alone give away about texts that were not tried."""
    growth = 1.0
    for one in _objects(parts):
        kind, content = one.get("type"), one.get("content") or one.get("prepend") or ""
        if kind in ("Replace", "Prepend") and isinstance(content, str):
            pattern = one.get("pattern") or {}
            growth *= max(len(content) / max(len(pattern.get("String") or "a"), 1), 1.0)
        if kind == "Precompiled" and (longest := _longest_piece(one)) > _BEYOND:
            return f"its character map has an entry of {longest:,} bytes"
    return f"its parts can make a text {growth:,.0f} times as long" if growth > _GROWTH else None


def _longest_piece(precompiled: dict[str, Any]) -> int:
    """The longest replacement of a SentencePiece character map: a trie, and behind it texts that end with a NUL."""
    raw = base64.b64decode(precompiled.get("precompiled_charsmap") or "")
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=0)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


if __name__ == "__main__":
    print(json.dumps(refusal(json.load(sys.stdin))))
