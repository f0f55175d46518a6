"""What a model name means. One resolver for every command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medicalgpt_cli.engine import starter
from medicalgpt_cli.engine.model.model_files import read_adapter_config, read_config, read_object
from medicalgpt_cli.engine.run import manifest
from medicalgpt_cli.engine.run.environment import cache_folder
from medicalgpt_cli.engine.run.hub_names import is_hub_name, nearest_path
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import did_you_mean
from medicalgpt_cli.settings.groups import ModelSettings

VOCABULARY = "vocabulary.json"  # the record that `medgpt vocabulary` puts into a model folder
Kind = Literal["folder", "hub", "gguf", "adapter", "config"]


@dataclass(frozen=True)
class ModelReference:
    """A name that was found: a model folder, a hub name, a .gguf file, or an adapter over a base.

    "config" is a config.json from which a new model starts.
    """

    name: str  # as the user gave it
    kind: Kind
    path: str  # the folder or file; for a hub model its name
    base: ModelReference | None = None  # of an adapter

    @property
    def folder(self) -> Path | None:
        """Where its files lie; None for a hub model."""
        if self.kind == "hub":
            return None
        return Path(self.path).parent if self.kind in ("gguf", "config") else Path(self.path)


@dataclass(frozen=True)
class ResolvedModel:
    """The model of a command: a base, and perhaps an adapter over it."""

    base: ModelReference
    adapter: ModelReference | None
    tokenizer: str  # the folder, hub name or .gguf file that the tokenizer is read from

    @property
    def is_starter(self) -> bool:
        """Whether the weights are the demonstration model's."""
        return Path(self.base.path) == starter.MODEL

    @property
    def label(self) -> str:
        """A short name for the screen and for folders."""
        chosen = self.adapter or self.base
        path = Path(chosen.name)
        if path.name == "model" and (path.parent / manifest.NAME).is_file():
            return path.resolve().parent.name
        return path.stem if chosen.kind == "gguf" else path.resolve().name if path.name == "" else path.name

    def parts(self) -> dict[str, ModelReference]:
        """The base and, where there is one, the adapter, under these names."""
        return {"base": self.base, **({"adapter": self.adapter} if self.adapter else {})}


def pulled_models() -> Path:
    """The folder in which `medgpt pull` keeps models by their short names."""
    return cache_folder() / "models"


def resolve(name: str, *, follow: bool = True) -> ModelReference:
    """Find what `name` means: a folder (model, adapter or run), a .gguf file, a pulled or a hub name.

    Args:
        follow: whether the base of an adapter is looked for, too.

    Raises:
        UsageError: nothing has this name, or what has it is no model.
    """
    if name == starter.NAME:
        return ModelReference(name, "folder", str(starter.MODEL))
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path, follow)
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelReference(name, "gguf", str(path))
        raise UsageError(f"{name} is a file, but no .gguf model", "name the model's folder")
    pulled = pulled_models() / name
    if pulled.is_dir() and "/" not in name:
        return ModelReference(name, "folder", str(pulled))
    if is_hub_name(name) and not name.startswith("runs/"):
        return ModelReference(name, "hub", name)
    raise _not_found(name)


def resolve_models(model: ModelSettings) -> ResolvedModel:
    """Base, adapter and tokenizer of the model options; `--lora-model` alone finds its base by itself.

    Where no model is named it is the starter.

    Raises:
        UsageError: a name leads nowhere, or base and adapter do not belong together.
    """
    base_name = model.base_model or (None if model.lora_model else starter.NAME)
    named = resolve(base_name) if base_name else None
    adapter = resolve(model.lora_model) if model.lora_model else None
    if adapter is not None and adapter.kind != "adapter":
        raise UsageError(f"--lora-model {model.lora_model} is a whole model", "give it as --base-model")
    if named is not None and named.kind == "adapter":
        if adapter is not None:
            raise UsageError(
                f"--base-model {model.base_model} is itself an adapter", "merge it first: medgpt merge-lora"
            )
        named, adapter = None, named
    base = named or adapter.base
    if base is None:
        raise UsageError(
            f"the base of {adapter.name} was not found: {_recorded_base(Path(adapter.path))}",
            "name it with --base-model",
        )
    if adapter is not None:
        _check_vocabulary(base, adapter)
    return ResolvedModel(base, adapter, _tokenizer_source(model, base, adapter))


def _folder(name: str, path: Path, follow: bool) -> ModelReference:
    if (path / manifest.NAME).is_file():  # a run folder: its model is what is meant
        if not (path / "model").is_dir():
            status = manifest.read(path)["status"]
            stage = manifest.read(path)["stage"]
            raise UsageError(
                f"{name} has no model yet (the run is {status})",
                f"go on with: medgpt {stage} --resume {name}",
            )
        path = path / "model"
    if (path / "adapter_config.json").is_file():
        read_adapter_config(path)
        return ModelReference(name, "adapter", str(path), _base_of(path) if follow else None)
    if (path / "config.json").is_file():
        read_config(path / "config.json")
        return ModelReference(name, "folder", str(path))
    inside = sorted(path.glob("*.gguf"))
    if len(inside) == 1:
        return ModelReference(name, "gguf", str(inside[0]))
    if (path / "model").is_dir():
        return _folder(name, path / "model", follow)
    raise UsageError(
        f"{name} is a folder without a model",
        "expected config.json, adapter_config.json, run.json or a .gguf file",
    )


def _recorded_base(adapter: Path) -> str:
    recorded = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if recorded and (not isinstance(recorded, str) or "\0" in recorded):
        raise UsageError(
            f"{adapter}/adapter_config.json: base_model_name_or_path is no name", "name it with --base-model"
        )
    return recorded or "none is recorded"


def _base_of(adapter: Path) -> ModelReference | None:
    """The base that an adapter records: as it is written, or seen from the adapter's folder."""
    recorded = _recorded_base(adapter)
    seen_from_adapter = os.path.join(adapter, recorded)  # noqa: PTH118 - keeps an absolute path
    candidates = [recorded, seen_from_adapter]
    if Path(recorded).parts[-3:] == starter.MODEL.parts[-3:]:  # made with medgpt installed somewhere else
        candidates.append(starter.NAME)
    for candidate in candidates:
        try:
            found = resolve(candidate, follow=False)
        except UsageError:
            continue
        if found.kind != "adapter":
            return found
    return None


def _check_vocabulary(base: ModelReference, adapter: ModelReference) -> None:
    """An adapter over a widened vocabulary brings the record of it, and its base must have the same.

    Raises:
        UsageError: the base has another vocabulary.
    """
    record = Path(adapter.path) / VOCABULARY
    if not record.is_file():
        return
    theirs = base.folder / VOCABULARY if base.folder else None
    if theirs is None or not theirs.is_file() or theirs.read_bytes() != record.read_bytes():
        raise UsageError(
            f"{adapter.name} was trained over a base with a widened vocabulary, and {base.name} is not that base",
            "leave out --base-model, or name the folder that `medgpt vocabulary` made",
        )


def _tokenizer_source(model: ModelSettings, base: ModelReference, adapter: ModelReference | None) -> str:
    if model.tokenizer_path:
        path = Path(model.tokenizer_path).expanduser()
        if path.is_dir() and not (path / "tokenizer_config.json").is_file() and (path / "model").is_dir():
            path = path / "model"
        if path.is_dir() and not (path / "tokenizer_config.json").is_file():
            raise UsageError(
                f"--tokenizer-path {model.tokenizer_path} holds no tokenizer",
                "expected tokenizer_config.json",
            )
        return str(path) if path.exists() else resolve(model.tokenizer_path).path
    if adapter is not None and (Path(adapter.path) / "tokenizer_config.json").is_file():
        return adapter.path
    return base.path


def _not_found(name: str) -> UsageError:
    near = nearest_path(name) or did_you_mean(name, _names_around(name))
    looked = "looked for a folder, a .gguf file, a run, a pulled model and a hub name"
    if "/" in name:
        looked += "; the hub is not asked for what looks like a path"
    hint = f"did you mean {near}?" if near else "`medgpt pull --list` shows what can be fetched"
    return UsageError(f"no model named {name} ({looked})", hint)


def _names_around(name: str) -> list[str]:
    """What could have been meant: pulled models; folders and .gguf files here, in runs/ and beside `name`."""
    places = [Path(), Path("runs"), Path(name).expanduser().parent]
    found = {str(one) for place in places for one in place.glob("*") if one.is_dir() or one.suffix == ".gguf"}
    pulled = [one.name for one in pulled_models().glob("*") if not one.name.startswith(".")]
    return [*sorted(found), *pulled, starter.NAME]
