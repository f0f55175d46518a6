"""`pipeline.json`: which steps are done, and from what, so that only what changed is done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medicalgpt_cli import __version__
from medicalgpt_cli.engine import starter
from medicalgpt_cli.engine.run import manifest
from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.engine.run.fingerprints import fingerprint_files
from medicalgpt_cli.errors import UsageError

NAME = "pipeline.json"


@dataclass(frozen=True)
class Done:
    """What is known about a step that began."""

    command: str
    fingerprint: str  # of the settings and of everything they name
    output: str  # the folder or file that it leaves
    status: str  # running or done
    seconds: float = 0.0
    left: str = ""  # a hash of what it left (`left_in`); none where an older medgpt ran it


class State:
    """The file as it stands; every change is on the disk before the call returns."""

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self.steps: dict[str, Done] = {}
        if self._path.is_file():
            try:
                content = json.loads(self._path.read_text(encoding="utf-8"))
                self.steps = {name: Done(**one) for name, one in content["steps"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UsageError(
                    f"{self._path}: not written by medgpt", "name another --output-dir"
                ) from None

    def put(self, name: str, done: Done) -> None:
        self.steps[name] = done
        content = {"medgpt": __version__, "steps": {name: asdict(one) for name, one in self.steps.items()}}
        atomic_write(self._path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def fingerprint(command: str, settings: Mapping[str, Any], needs: Mapping[str, str]) -> str:
    """A hash of a step's settings, of the files and folders that they name, and of the steps it builds on.

    Args:
        settings: recipe keys and values, with `${step}` as it is written.
        needs: fingerprints of those steps.
    """
    known = {
        "medgpt": __version__,
        "command": command,
        "settings": settings,
        "files": {text: _content(Path(text)) for text in _texts(settings) if Path(text).exists()},
        "needs": needs,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode("utf-8")).hexdigest()


def _texts(value: Any) -> list[str]:
    """Every text of the settings that may be a path; a weight behind it (`zh.jsonl:0.7`) is left out."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    if not isinstance(value, str) or not value or len(value) > 1000 or "\n" in value:
        return []
    if value == starter.NAME:  # a model's name, whatever lies in the working folder
        return []
    return [value, value.rpartition(":")[0]] if ":" in value[1:] else [value]


def left_in(output: str) -> str:
    """A hash of what a step has left for others: the model of a run, else the folder or file."""
    path = Path(output)
    content = _content(path / "model" if (path / manifest.NAME).is_file() else path)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def _content(path: Path) -> Any:
    """The SHA-256 of a file, or of each below a folder by its name; nothing where there is none."""
    if path.is_file():
        return fingerprint_files({"": path})[""]["sha256"]
    files = sorted(one for one in path.rglob("*") if one.is_file() and "checkpoints" not in one.parts)
    found = fingerprint_files({str(one.relative_to(path)): one for one in files})
    return {name: about["sha256"] for name, about in found.items()}
