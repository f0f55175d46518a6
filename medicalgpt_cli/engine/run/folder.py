"""A run folder: made once, never overwritten, used by one process at a time.

runs/<stage>-<model>-<time>/
  recipe.yaml    the settings as resolved; usable with --recipe
  run.json       what went in and what came out (manifest.py)
  metrics.jsonl  one line a log step (metrics.py)
  report.html    the same for people (report.py)
  before.json    held-out figures before the first step, item by item: numbers and hashes, no text
  checkpoints/   for --resume (checkpoints.py)
  model/         the result

The user alone may read it, since metrics and reports hold held-out text and weights can know text by heart. With
--group-readable the group may read `model/`, and pass through the run folder to get there.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medicalgpt_cli.engine.run import manifest
from medicalgpt_cli.engine.run.files import (
    GROUP,
    PASSABLE,
    PRIVATE,
    TEMPORARY,
    atomic_write,
    open_to_others,
    private_folder,
    publish,
    remove_tree,
    set_modes,
)
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import options_of

_LOCK = ".lock"
_ITEMS_BEFORE = "before.json"


class RunFolder:
    """One run on disk. Made by `create` or `open_for_resume`; both hold its lock until `close`."""

    def __init__(self, path: Path | str):
        """A view of an existing folder, for reading; takes no lock."""
        self.path = Path(path)
        self._lock: FileLock | None = None
        self.group_readable = False  # whether the group may read the model
        self.was_open = False  # whether others could read it when it was taken up again

    # -- what is in it -------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / manifest.NAME

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer and chat template lie beside the weights, where every other tool looks for them."""
        return self.model

    @property
    def new_model(self) -> Path:
        """Where the result is written before `publish_model` gives it its name."""
        return self.path / f"model{TEMPORARY}"

    # -- its life ------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        stage: str,
        model_label: str,
        settings: Any,
        origins: Mapping[str, str] | None = None,
    ) -> RunFolder:
        """Make the folder with its recipe and a manifest that says "running".

        The place is `settings.output_dir`, or runs/<stage>-<model>-<time> below the working folder.

        Raises:
            UsageError: the folder that was asked for is not empty.
        """
        path = getattr(settings, "output_dir", None)
        if path and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(
                f"--output-dir {path} is not empty",
                "name a new folder; an interrupted run goes on with --resume",
            )
        if path:
            private_folder(path)
        run = cls(path or _new_folder(Path("runs"), stage, model_label))
        run.group_readable = getattr(settings, "group_readable", False)
        run._acquire()
        if run.manifest.exists():  # another process was quicker
            run.close()
            raise UsageError(f"{run.path} was just made by another process", "name another --output-dir")
        atomic_write(run.recipe, recipe_text(stage, settings))
        manifest.write(run.manifest, manifest.new(stage, model_label, settings, origins))
        return run

    @classmethod
    def open_for_resume(cls, path: Path | str, stage: str, *, group_readable: bool = False) -> RunFolder:
        """Take up an interrupted run; what others could read in it is closed to them.

        Raises:
            UsageError: no run folder, another stage's, one that is done, or one another process works in.
        """
        run = cls(path)
        known = run.read()
        if known["stage"] != stage:
            raise UsageError(
                f"{path} is a {known['stage']} run", f"go on with `medgpt {known['stage']} --resume {path}`"
            )
        if known["status"] == "done":
            raise UsageError(
                f"{path} is finished", "start a new run on top of it: --lora-model or --base-model"
            )
        run._acquire()
        run.group_readable, run.was_open = group_readable, open_to_others(run.path)
        run.close_to_others()
        run.update(status="running", finished=None, resumed=[*known.get("resumed", []), manifest.now()])
        return run

    def read(self) -> dict[str, Any]:
        """The manifest as it stands on disk."""
        return manifest.read(self.path)

    def update(self, **parts: Any) -> None:
        """Put top-level entries into run.json: data, tokenizer, parents, device, result …"""
        manifest.write(self.manifest, {**self.read(), **parts})

    def keep_items_before(self, items: Mapping[str, Any]) -> None:
        """Keep what was measured before the first step item by item, for comparing it with the end in pairs."""
        atomic_write(self.path / _ITEMS_BEFORE, json.dumps(items) + "\n")

    def items_before(self) -> dict[str, Any]:
        """What was kept; empty where nothing was (a run that an older medgpt began)."""
        path = self.path / _ITEMS_BEFORE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def finish(self, status: str, result: Mapping[str, Any] | None = None) -> None:
        """Say how the run ended: done, stopped (goes on with --resume) or failed."""
        if status not in manifest.STATUSES:
            raise ValueError(f"unknown status {status}")
        parts: dict[str, Any] = {"status": status, "finished": manifest.now()}
        if result is not None:
            parts["result"] = dict(result)
        self.close_to_others()  # also what libraries have written
        self.update(**parts)

    def close_to_others(self) -> None:
        """Let the user alone read everything, but for a model that the group may read."""
        opened = self.group_readable and self.model.is_dir()
        set_modes(self.path, PRIVATE, leave_out=[self.model] if opened else [])
        if opened:
            set_modes(self.model, GROUP)
            self.path.chmod(PASSABLE)

    def closed_parents(self) -> list[Path]:
        """Folders above that let nobody but their owner through, for a run whose model others are to read."""
        return [one for one in self.path.resolve().parents if not one.stat().st_mode & 0o011]

    def publish_model(self) -> Path:
        """Give the finished `new_model` folder its name `model`: synced, renamed, never half there.

        A model that is there already was left by a kill between this and `finish`; it gives way.
        """
        aside = self.path / f"old-model{TEMPORARY}"
        remove_tree(aside)
        if self.model.exists():
            self.model.rename(aside)
        published = publish(self.new_model, self.model, GROUP if self.group_readable else PRIVATE)
        remove_tree(aside)
        return published

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None  # the file stays: deleting it could take it from under a process that waits

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _acquire(self) -> None:
        lock = FileLock(self.path / _LOCK, mode=0o600)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another process is working in {self.path}", "wait for it to end, or name another folder"
            ) from None
        self._lock = lock


class Onlooker(RunFolder):
    """The folder of a run of several processes, for those that do not write."""

    def update(self, **_: Any) -> None:
        return

    def keep_items_before(self, items: Mapping[str, Any]) -> None:
        return

    def finish(self, status: str, result: Mapping[str, Any] | None = None) -> None:
        return

    def close_to_others(self) -> None:
        return


def recipe_text(stage: str, settings: Any) -> str:
    """The settings as YAML that `medgpt <stage> --recipe` reads; those that are off are comments."""
    import yaml

    lines = [f"# medgpt {stage} --recipe recipe.yaml"]
    for name in options_of(settings):
        if name in manifest.OF_THE_CALL:
            continue
        value = manifest.plain(getattr(settings, name))
        entry = yaml.safe_dump({name.replace("_", "-"): value}, allow_unicode=True, width=10_000).rstrip()
        lines.append(f"# {name.replace('_', '-')}:" if value is None or value == [] else entry)
    return "\n".join(lines) + "\n"


def _new_folder(parent: Path, stage: str, model_label: str) -> Path:
    """Make a folder whose name is what a person looks for: stage, model, time; numbered where it is taken."""
    label = re.sub(r"[^\w.-]+", "-", model_label.rstrip("/").split("/")[-1]).strip("-.") or "model"
    name = f"{stage}-{label[:40]}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True, mode=PRIVATE)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")
