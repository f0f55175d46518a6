"""What a run is built on, file by file: recorded as it begins, and the same when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.model.base_record import changed, check_base, describe, listed
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import manifest
from medicalgpt_cli.errors import UsageError


def begin(models: Mapping[str, ResolvedModel], observer: Observer, *, accept: bool) -> dict[str, Any]:
    """The entries of run.json about the models that a new run is built on.

    Args:
        models: under what the names of their parts begin with: "" for the model that is trained.
        accept: `--accept-other-base`.

    Raises:
        UsageError: an adapter was trained over another base.
    """
    accepted = {}
    for prefix, resolved in models.items():
        different = check_base(resolved, observer, accept=accept)
        if different:
            accepted[f"{prefix}base"] = different
    parents = {
        name: {**manifest.parent(one.name, one.folder), "files": describe(one, observer)}
        for name, one in _parts(models).items()
    }
    return {"parents": parents, **_accepted({}, accepted)}


def go_on(
    recorded: Mapping[str, Any],
    models: Mapping[str, ResolvedModel],
    observer: Observer,
    run: Path,
    *,
    accept: bool,
) -> dict[str, Any]:
    """The same entries of a run that goes on. What an older medgpt has not recorded is from now on.

    Raises:
        UsageError: a model has changed since, and it was not accepted; an adapter is never.
    """
    parents, accepted, refused = {**recorded.get("parents", {})}, {}, []
    for prefix, resolved in models.items():
        # A hub model may not have been here as the run began; an older medgpt recorded no files.
        if not parents.get(f"{prefix}base", {}).get("files"):
            different = check_base(resolved, observer, accept=accept)
            if different:
                accepted[f"{prefix}base"] = different
    for name, one in _parts(models).items():
        files, before = describe(one, observer), parents.get(name, {}).get("files")
        if files is None:
            continue
        different = changed(before, files) if before else []
        if different and accept and one.kind not in ("adapter", "config"):
            accepted[name] = different
            observer.on_warning(f"--accept-other-base: {_spoken(name)}: {listed(different)}")
        elif different:
            refused.append(f"{_spoken(name)}: {listed(different)}")
        parents[name] = {**manifest.parent(one.name, one.folder), **parents.get(name, {}), "files": files}
    if refused:
        raise UsageError(
            f"{run} cannot go on with other models than it began with: {'; '.join(refused)}",
            "put the same files back, or start a new run; "
            "--accept-other-base takes a converted or re-sharded copy of a base",
        )
    return {"parents": parents, **_accepted(recorded, accepted)}


def _parts(models: Mapping[str, ResolvedModel]) -> dict[str, ModelReference]:
    return {
        f"{prefix}{name}": one
        for prefix, resolved in models.items()
        for name, one in resolved.parts().items()
    }


def _spoken(name: str) -> str:
    """ "reward_model_base" as people say it."""
    return name.replace("reward_model_", "the reward model's ").replace("_", " ")


def _accepted(recorded: Mapping[str, Any], accepted: Mapping[str, Any]) -> dict[str, Any]:
    if not accepted:
        return {}
    return {
        "accepted_other_base": [
            *recorded.get("accepted_other_base", []),
            {"at": manifest.now(), **accepted},
        ]
    }
