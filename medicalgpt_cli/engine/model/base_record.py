"""What a model is made of, file by file, and the base that an adapter was trained over.

`base.json` lies beside an adapter's weights and travels with them: the base's files by size and SHA-256. An adapter
over other weights computes something else without a word, so that another base is refused unless it is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.model.references import VOCABULARY, ModelReference, ResolvedModel
from medicalgpt_cli.engine.model.weight_files import files_folder, weight_files_of
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.engine.run.fingerprints import fingerprint_files
from medicalgpt_cli.errors import UsageError

RECORD = "base.json"
# Beside the weights: what says how they compute, when an answer ends, and what learns.
_CONFIG = ("config.json", "adapter_config.json", "generation_config.json", VOCABULARY, "reward.json")
_NOT_OF_THE_BASE = ("generation_config.json", "reward.json")  # an adapter brings its own, or asks for none

Files = Mapping[str, Mapping[str, Any]]  # name to {"bytes", "sha256"}


def describe(model: ModelReference, observer: Observer) -> dict[str, dict[str, Any]] | None:
    """The files that a model is loaded from, by size and SHA-256; None for a hub model that is not here yet.

    Raises:
        UsageError: a file is missing or cannot be read.
    """
    try:
        files = _files_of(model)
        return None if files is None else fingerprint_files(files, observer, model.name)
    except OSError as problem:
        raise UsageError(
            f"{model.name}: {Path(str(problem.filename)).name} cannot be read ({problem.strerror})",
            "is the copy complete?",
        ) from None


def _files_of(model: ModelReference) -> dict[str, Path] | None:
    if model.kind in ("gguf", "config"):
        return {Path(model.path).name: Path(model.path)}
    folder, weights = files_folder(model), weight_files_of(model)
    if folder is None or not weights or (model.kind == "adapter" and not weights[0].is_file()):
        return None if model.kind == "hub" else {}  # what is missing is said where it is loaded
    found = [*weights, *(folder / name for name in _CONFIG if (folder / name).is_file())]
    return {file.relative_to(folder).as_posix(): file for file in found}


def changed(before: Files, now: Files) -> list[str]:
    """What differs, in words: a file's name and whether it changed, is missing or is new."""
    words = [
        f"{name} changed" if name in now else f"{name} is missing"
        for name in before
        if before[name] != now.get(name)
    ]
    return words + [f"{name} is new" for name in now if name not in before]


def write_record(folder: Path, base: Files) -> None:
    """Put the record of its base beside an adapter."""
    atomic_write(folder / RECORD, json.dumps({"format": 1, "files": base}, indent=1) + "\n")


def read_record(adapter: ModelReference) -> Files | None:
    """The files of the base that an adapter was trained over; None where it records none.

    Raises:
        UsageError: the record is damaged.
    """
    path = Path(adapter.path) / RECORD
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): {"bytes": one["bytes"], "sha256": one["sha256"]} for name, one in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: not a record of a base model", "was the copy complete?") from None


def check_base(resolved: ResolvedModel, observer: Observer, *, accept: bool = False) -> list[str]:
    """See that the base is the one that the adapter was trained over, where the adapter says which.

    Args:
        accept: take another one, which is `--accept-other-base`.

    Returns:
        What differs and was accepted, in words.

    Raises:
        UsageError: another base, and it was not accepted.
    """
    adapter, base = resolved.adapter, resolved.base
    if adapter is None or processes.rank() > 0:
        return []
    recorded = read_record(adapter)
    if recorded is None:
        return []
    now = describe(base, observer)
    if now is None:
        return []
    different = changed(_of_the_base(recorded), _of_the_base(now))
    if different and not accept:
        raise UsageError(
            f"{adapter.name} was trained over another base than {base.name}: {listed(different)}",
            "name the base that it was trained over; --accept-other-base takes a converted or re-sharded copy",
        )
    if different:
        observer.on_warning(
            f"--accept-other-base: {base.name} is not the base that {adapter.name} was trained over "
            f"({listed(different)})"
        )
    return different


@contextmanager
def known_base(resolved: ResolvedModel, observer: Observer, *, accept: bool) -> Iterator[list[str]]:
    """`check_base` around loading: before it, and of a hub model, which only loading fetches, behind it.

    Raises:
        What `check_base` does.
    """
    accepted = check_base(resolved, observer, accept=accept)
    yield accepted
    if resolved.base.kind == "hub" and not accepted:
        accepted += check_base(resolved, observer, accept=accept)


def _of_the_base(files: Files) -> Files:
    return {name: one for name, one in files.items() if name not in _NOT_OF_THE_BASE}


def listed(words: list[str], most: int = 3) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
