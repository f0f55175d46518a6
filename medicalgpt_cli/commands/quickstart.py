"""`medgpt quickstart`: the pipeline that ships, on the starter."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from medicalgpt_cli.commands.pipeline import run_pipeline
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import QuickstartSettings


def run(settings: QuickstartSettings, observer: Observer) -> dict[str, Any]:
    from medicalgpt_cli.engine.pipeline.recipe import read_pipeline

    pipeline = read_pipeline(Path(str(resources.files("medicalgpt_cli"))) / "recipes" / "quickstart.yaml")
    again = f"medgpt quickstart --output-dir {settings.output_dir}"
    return run_pipeline(pipeline, settings.output_dir, again, observer, show=not settings.json)
