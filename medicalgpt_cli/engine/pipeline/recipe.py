"""A pipeline's YAML file: its steps in order, each a recipe of one command.

output-dir: runs/first
steps:
  pretrain:                    # a step is named after its command…
    train-data: [books.txt]
  sft-zh:                      # …or says which command it is
    command: sft
    lora-model: ${pretrain}    # what an earlier step left
    train-data: [zh.jsonl]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine import starter
from medicalgpt_cli.errors import UnsafeRefused, UsageError
from medicalgpt_cli.settings.fields import did_you_mean

# What a step of each command leaves, and the option that says where.
OUTPUTS = {
    "pretrain": "output-dir",
    "sft": "output-dir",
    "reward": "output-dir",
    "rl": "output-dir",
    "merge-lora": "output-dir",
    "vocabulary": "output-dir",
    "infer": "predictions-file",
    "score": "predictions-file",
}
TRAINING = ("pretrain", "sft", "reward", "rl")
BUILT_IN = {"samples": str(starter.SAMPLES)}  # the sample records that ship with medgpt
_LARGEST, _MOST_VALUES = 1 << 20, 100_000  # characters of a recipe's file; values in it
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Step:
    name: str
    command: str
    settings: Mapping[str, Any]  # as written: recipe keys, references unresolved

    @property
    def needs(self) -> list[str]:
        """The names that it refers to, built-in ones left out."""
        return [name for name in _references(self.settings) if name not in BUILT_IN]

    def resolved(self, outputs: Mapping[str, str]) -> dict[str, Any]:
        """The settings with every `${name}` replaced by what that step leaves."""
        known = {**BUILT_IN, **outputs}

        def fill(value: Any) -> Any:
            if isinstance(value, list):
                return [fill(one) for one in value]
            if isinstance(value, str):
                return _REFERENCE.sub(lambda found: known[found[1]], value)
            return value

        return {key: fill(value) for key, value in self.settings.items()}


@dataclass(frozen=True)
class Pipeline:
    steps: tuple[Step, ...]
    output_dir: Path | None


def _values(content: Any) -> Iterator[Any]:
    """All values, those behind an alias each time that it stands there."""
    yield content
    if isinstance(content, dict):
        content = [*content, *content.values()]
    if isinstance(content, list | tuple):
        for one in content:
            yield from _values(one)


def read_yaml(path: Path, shape: str) -> Any:
    """The content of a recipe's file; `shape` is the hint where it is none.

    Raises:
        UsageError: the file is missing or is not YAML.
        UnsafeRefused: it is larger, or stands for more values, than a recipe does.
    """
    import yaml

    try:
        if path.exists() and not path.is_file() and not str(path).startswith("/dev/fd/"):
            raise UsageError(f"--recipe {path} is no file", "name a YAML file")
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise UnsafeRefused(f"--recipe {path}: more than {_LARGEST:,} characters", "name a YAML file")
        content = yaml.safe_load(text)
        if sum(1 for _ in itertools.islice(_values(content), _MOST_VALUES)) == _MOST_VALUES:
            raise UnsafeRefused(f"{path}: its references stand for {_MOST_VALUES:,} values", shape)
        return content
    except OSError as problem:
        raise UsageError(f"--recipe {path}: {problem.strerror}", "name a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as problem:
        mark = getattr(problem, "problem_mark", None)
        raise UsageError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML", shape) from None


def read_pipeline(path: Path) -> Pipeline:
    """
    Raises:
        UsageError: no file, no YAML, an unknown key or command, or a reference to no earlier step.
    """
    content = read_yaml(path, _SHAPE)
    if not isinstance(content, dict) or not isinstance(content.get("steps"), dict) or not content["steps"]:
        raise UsageError(f"{path}: no steps", _SHAPE)
    for key in content.keys() - {"steps", "output-dir"}:
        raise UsageError(f"{path}: unknown key {key}", _SHAPE)
    steps: list[Step] = []
    for name, settings in content["steps"].items():
        steps.append(_step(path, str(name), settings, [one.name for one in steps]))
    place = content.get("output-dir")
    return Pipeline(tuple(steps), Path(place) if place else None)


_SHAPE = "a pipeline is `output-dir:` and `steps:`, and under these a recipe for each; see docs/pipeline.md"


def _step(path: Path, name: str, settings: Any, earlier: list[str]) -> Step:
    at = f"{path}: step {name}"
    if not re.fullmatch(r"[\w-]+", name) or name in BUILT_IN:
        raise UsageError(f"{at}: not a name for a step", "letters, digits, - and _; it names a folder")
    if not isinstance(settings, dict):
        raise UsageError(f"{at}: no settings", _SHAPE)
    settings = {str(key).replace("_", "-"): value for key, value in settings.items()}
    command = str(settings.pop("command", name))
    if command not in OUTPUTS:
        near = did_you_mean(command, OUTPUTS)
        hint = f"did you mean {near}?" if near else f"`command:` is one of {', '.join(OUTPUTS)}"
        raise UsageError(f"{at}: {command} is no command of a pipeline", hint)
    for key in (OUTPUTS[command], "resume", "overwrite", "dry-run", "json", "debug", "interactive"):
        if key in settings:
            raise UsageError(f"{at}: {key} is the pipeline's to decide", f"leave out {key}")
    for needed in _references(settings):
        if needed not in BUILT_IN and needed not in earlier:
            raise UsageError(
                f"{at}: ${{{needed}}} is no earlier step",
                f"earlier ones: {', '.join(earlier) or 'none'}; built in: {', '.join(BUILT_IN)}",
            )
    return Step(name, command, settings)


def _references(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [name for one in value for name in _references(one)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []
