"""`medgpt pipeline`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import PipelineSettings


def run(settings: PipelineSettings, observer: Observer) -> dict[str, Any]:
    from medicalgpt_cli.engine.pipeline.recipe import read_pipeline

    pipeline = read_pipeline(Path(str(settings.recipe)))
    folder = settings.output_dir or pipeline.output_dir
    if folder is None:
        raise UsageError("no folder is named", "give --output-dir, or write output-dir into the file")
    again = f"medgpt pipeline --recipe {settings.recipe} --output-dir {folder}"
    return run_pipeline(pipeline, folder, again, observer, dry_run=settings.dry_run, show=not settings.json)


def run_pipeline(
    pipeline: Any, folder: Path, again: str, observer: Observer, *, dry_run: bool = False, show: bool = True
) -> dict[str, Any]:
    from medicalgpt_cli.engine.pipeline.run import check
    from medicalgpt_cli.engine.pipeline.run import run as go

    result = (check if dry_run else go)(pipeline, folder, prepare, again, observer)
    if show:
        from medicalgpt_cli.terminal.pipeline_view import show_result

        show_result(result)
    return result


def prepare(command: str, values: Mapping[str, Any]) -> Callable[[Observer], Any]:
    """A step as the command that a person would type: the same checks, the same code."""
    from medicalgpt_cli.commands.bridge import settings_from
    from medicalgpt_cli.commands.catalogue import COMMANDS

    known = next(one for one in COMMANDS if one.name == command)
    # With --json a command prints nothing of its own: the result of a step is part of the pipeline's.
    settings = settings_from(command, known.settings, {**values, "json": True}, command)
    return lambda observer: importlib.import_module(known.module).run(settings, observer)
