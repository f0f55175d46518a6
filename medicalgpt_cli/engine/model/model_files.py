"""The small files of a model folder, which somebody else wrote: bounded before anything is built of them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.model import pattern_child
from medicalgpt_cli.engine.run import bounded
from medicalgpt_cli.errors import MedgptError, UnsafeRefused, UsageError

_LARGEST = 16 << 20  # bytes of a configuration
_DEEPEST = 50  # objects and lists in one another
_SCRIPT = Path(pattern_child.__file__)
_HINT = "was the copy complete, and is it from where you meant?"
# The largest value of what a configuration counts, by the end of its name; the largest models in use have 126 layers,
# 18,432 wide, 2,048 experts, 262,208 tokens and a context of 10,485,760.
_BOUNDS = (
    (re.compile(r"layers?$|depths?$|blocks?$"), 1_024),
    (re.compile(r"experts?$|heads$|groups$"), 65_536),
    (re.compile(r"vocab_size$|num_labels$"), 1 << 26),
    (re.compile(r"(size|dim|width|rank|inner|embd|model|channels)$|^r$"), 1 << 24),
    (re.compile(r"positions|context|_len(gth)?$|window"), 1 << 40),
)
_OTHER_NUMBERS = 1 << 63
_MOST_REPLICATED = 1_024  # layers that an adapter's `layer_replication` makes
_PATTERN_SECONDS, _PATTERN_MEMORY = 1, 256 << 20
_PATTERN_LONGEST = 10_000


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UsageError: it is missing, or is none.
        UnsafeRefused: it is larger or deeper than a configuration is.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path} is missing", _HINT)
        if path.stat().st_size > _LARGEST:
            raise UnsafeRefused(f"{path}: more than {_LARGEST >> 20} MiB", _HINT)
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UnsafeRefused(f"{path}: more than {_DEEPEST} objects and lists in one another", _HINT) from None
    except ValueError:  # of JSON, of UTF-8, and of numbers of thousands of digits
        raise UsageError(f"{path}: not a JSON object", _HINT) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object", _HINT)
    return content


def read_config(path: Path) -> dict[str, Any]:
    """A model's config.json with sizes that a model can have.

    Raises:
        UsageError: it is none. UnsafeRefused: a number in it is out of all proportion.
    """
    content = read_object(path)
    check_sizes(content, path)
    return content


def check_sizes(value: Any, path: Path | str, depth: int = 1, name: str = "") -> None:
    """Refuse a configuration that counts what no model has.

    Raises:
        UnsafeRefused: the name of the number, or that it is nested too deeply.
    """
    if depth > _DEEPEST:
        raise UnsafeRefused(f"{path}: more than {_DEEPEST} objects and lists in one another", _HINT)
    if isinstance(value, dict):
        for key, inner in value.items():
            check_sizes(inner, path, depth + 1, key)
    elif isinstance(value, list):
        for inner in value:
            check_sizes(inner, path, depth + 1, name)
    elif isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_id"):
        most = next((most for ending, most in _BOUNDS if ending.search(name)), _OTHER_NUMBERS)
        if abs(value) > most and value not in (float("inf"), float("-inf")):
            raise UnsafeRefused(f"{path}: {name[:40]} is beyond {most:,}", _HINT)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """A PEFT adapter's adapter_config.json, whose patterns and sizes are bounded.

    Raises:
        UsageError: it is none.
        UnsafeRefused: a size or a pattern would take any time or memory, or it names code to be imported.
    """
    path = folder / "adapter_config.json"
    content = read_object(path)
    check_sizes(content, path)
    if content.get("alora_invocation_tokens") is not None:
        raise UsageError(
            f"{path}: an adapter that waits for certain tokens (aLoRA) is not supported", "take a LoRA"
        )
    rows = content.get("trainable_token_indices")
    if rows is not None and not isinstance(rows, list | dict):
        raise UsageError(f"{path}: trainable_token_indices is no list", _HINT)
    _check_rank(content, folder)
    if content.get("megatron_config") is not None:
        raise UnsafeRefused(f"{path}: megatron_config names a library to be imported", _HINT)
    _check_replication(content.get("layer_replication"), path)
    _check_patterns(content, path)
    return content


def _check_rank(content: dict[str, Any], folder: Path) -> None:
    """An adapter's matrices are made before its file is read: refuse a rank that the file cannot hold."""
    weights = folder / "adapter_model.safetensors"
    pattern = content.get("rank_pattern")
    ranks = [content.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]
    most = max(weights.stat().st_size // 2, 64) if weights.is_file() else 1 << 16
    if any(isinstance(one, int) and one > most for one in ranks):
        raise UnsafeRefused(f"{folder}: r is beyond {most:,}, which its weights cannot have", _HINT)


def _check_replication(ranges: Any, path: Path) -> None:
    if ranges is None:
        return
    pairs = isinstance(ranges, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(end, int) for end in one) for one in ranges
    )
    if not pairs:
        raise UsageError(f"{path}: layer_replication is no list of pairs", "[[0, 4], [2, 6]]")
    if sum(max(end - start, 0) for start, end in ranges) > _MOST_REPLICATED:
        raise UnsafeRefused(f"{path}: layer_replication makes more than {_MOST_REPLICATED:,} layers", _HINT)


def _check_patterns(content: dict[str, Any], path: Path) -> None:
    """Patterns are matched with every layer's name: one can take longer than anybody waits."""
    found = [content.get(name) for name in ("target_modules", "exclude_modules", "target_parameters")]
    layers = content.get("layers_pattern")
    found += layers if isinstance(layers, list) else [layers]
    for name in ("rank_pattern", "alpha_pattern"):
        found += content[name] if isinstance(content.get(name), dict) else []
    patterns = sorted({one for one in found if isinstance(one, str) and re.escape(one) != one})
    if any(len(one) > _PATTERN_LONGEST for one in patterns):
        raise UnsafeRefused(f"{path}: a pattern of more than {_PATTERN_LONGEST:,} characters", _HINT)
    if not patterns or bounded.passed_before(_SCRIPT, patterns):
        return
    try:
        valid = bounded.ask(_SCRIPT, patterns, memory=_PATTERN_MEMORY, seconds=_PATTERN_SECONDS)
    except bounded.OutOfBounds as bound:
        raise UnsafeRefused(f"{path}: a pattern takes more than {bound} for some names", _HINT) from None
    if not valid:
        raise UsageError(f"{path}: a pattern is no regular expression", _HINT)
    bounded.remember(_SCRIPT, patterns)


@contextlib.contextmanager
def building(place: Any, what: str, hint: str = _HINT) -> Iterator[None]:
    """A library builds something of somebody's files: what it fails with is about them.

    Raises:
        UsageError: `place`: `what`, and the kind of the library's error. Errors of ours and of memory pass.
    """
    try:
        yield
    except (MedgptError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as problem:
        if not is_panic(problem) and (not isinstance(problem, Exception) or is_about_memory(problem)):
            raise
        raise UsageError(f"{place}: {what} ({type(problem).__name__})", hint) from problem


def is_panic(problem: BaseException) -> bool:
    """Whether a library in Rust gave up; such an error is no Exception."""
    return type(problem).__name__ == "PanicException"


def is_about_memory(problem: BaseException) -> bool:
    word = str(problem).lower()
    return isinstance(problem, RuntimeError) and ("out of memory" in word or "allocate memory" in word)
