"""`run.json`: what a run was made of and what came out of it.

Keys: format, medgpt, stage, model, status (running, done, stopped, failed), started, finished (UTC),
settings {field: {"value", "origin"}}, environment (with library versions), and what the stage adds: data,
fingerprints, parents, before, result.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from medicalgpt_cli import __version__
from medicalgpt_cli.engine.run.environment import describe
from medicalgpt_cli.engine.run.files import atomic_write, sha256_file
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import base_type, flag_of, options_of

FORMAT = 1
NAME = "run.json"
STATUSES = ("running", "done", "stopped", "failed")

# Settings that say how one call behaves; a resumed run takes them from the new call.
OF_THE_CALL = ("output_dir", "resume", "dry_run", "force", "accept_other_base", "json", "debug")
# Settings that a new call may change, since they do not change what is learnt.
MAY_CHANGE = ("report_to", "keep_checkpoints", "processes", "gpus", "accelerate_config", "group_readable")

_Settings = TypeVar("_Settings")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new(
    stage: str, model_label: str, settings: Any, origins: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The manifest of a run that begins now."""
    return {
        "format": FORMAT,
        "medgpt": __version__,
        "stage": stage,
        "model": model_label,
        "status": "running",
        "started": now(),
        "finished": None,
        "settings": with_origins(settings, origins),
        "environment": describe(),
    }


def with_origins(settings: Any, origins: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Every setting as {"value", "origin"}; the origin is flag, environment, recipe or default."""
    origins = settings.origins if origins is None else origins
    return {
        name: {"value": plain(getattr(settings, name)), "origin": origins.get(name, "default")}
        for name in options_of(settings)
    }


def plain(value: Any) -> Any:
    """A settings value as JSON and YAML can hold it."""
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replace `run.json` as a whole."""
    atomic_write(path, json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The manifest in a run folder, or at the path of a `run.json`.

    Raises:
        UsageError: there is none, or it was not written by a medgpt that this one understands.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent} is not a run folder", f"a run folder holds a {NAME}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise UsageError(f"{path}: not valid JSON", "the file was changed by hand or damaged") from None
    if not isinstance(content, dict) or "stage" not in content or "format" not in content:
        raise UsageError(f"{path}: not written by medgpt", "name a folder that a training command made")
    if content["format"] > FORMAT:
        raise UsageError(f"{path}: written by a newer medgpt ({content.get('medgpt')})", "update medgpt")
    return content


def parent(name: str, folder: Path | str | None) -> dict[str, Any]:
    """How a run refers to the model it started from: its name and, for a run folder, its manifest's hash."""
    described: dict[str, Any] = {"name": name}
    if folder is not None:
        for place in (Path(folder), Path(folder).parent):  # the run, or the model/ folder in it
            if (place / NAME).is_file():
                described["run"] = str(place)
                described["run_json_sha256"] = sha256_file(place / NAME)
                break
    return described


def resumed_settings(manifest: Mapping[str, Any], given: _Settings, path: Path | str = "") -> _Settings:
    """The settings an interrupted run began with, for going on with it.

    What was not given this time is taken from the run.

    Raises:
        UsageError: a flag, variable or recipe key contradicts the run; each difference is named.
    """
    recorded = manifest["settings"]
    origins, values, differences = {}, {}, []
    for name, (option, _) in options_of(given).items():
        origin = given.origins.get(name, "default")
        chosen = origin != "default"
        if name in OF_THE_CALL or (name in MAY_CHANGE and chosen):
            origins[name] = origin
            continue
        # An option newer than the run: the run did what is its default.
        entry = recorded.get(name) or {"value": plain(option.default), "origin": "default"}
        before = _typed(type(given), name, entry["value"])
        if chosen and plain(getattr(given, name)) != plain(before):
            differences.append(f"{flag_of(name)} {_spell(before)} → {_spell(getattr(given, name))}")
        values[name], origins[name] = before, entry["origin"]
    if differences:
        raise UsageError(
            f"{path or 'the run'} began with other settings: {'; '.join(differences)}",
            "leave these out to go on, or start a new run",
        )
    return dataclasses.replace(given, **values, origins=origins)


def _typed(settings_class: type, name: str, value: Any) -> Any:
    """A JSON value as the settings field wants it."""
    kind, _, repeated = base_type(settings_class, name)
    if repeated:
        return tuple(value)
    return kind(value) if value is not None and kind in (Path, float) else value


def _spell(value: Any) -> str:
    value = plain(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
