"""Run a pipeline: each step once, what is done and unchanged left as it is, an interrupted step gone on with."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.pipeline.figures import figures
from medicalgpt_cli.engine.pipeline.recipe import OUTPUTS, TRAINING, Pipeline, Step
from medicalgpt_cli.engine.pipeline.report import write_report
from medicalgpt_cli.engine.pipeline.state import Done, State, fingerprint, left_in
from medicalgpt_cli.engine.run import manifest
from medicalgpt_cli.engine.run.files import atomic_write, private_folder
from medicalgpt_cli.errors import MedgptError, UsageError

# Checks the settings of a command (recipe keys to values) and gives a function that runs it.
Prepare = Callable[[str, Mapping[str, Any]], Callable[[Observer], Any]]


def run(pipeline: Pipeline, folder: Path, prepare: Prepare, again: str, observer: Observer) -> dict[str, Any]:
    """
    Args:
        folder: where the steps' outputs, `pipeline.json` and `report.html` go.
        prepare: how a step becomes a command.
        again: the command line that goes on with this pipeline, for the hint of a failure.

    Raises:
        UsageError: a step's settings are wrong; nothing was run.
        MedgptError: what the step that failed raised, with `again` in its hint.
    """
    check(pipeline, folder, prepare)
    private_folder(folder)
    with _locked(folder):
        state, fresh = State(folder), 0
        for number, step in enumerate(pipeline.steps, 1):
            label = f"step {number} of {len(pipeline.steps)}, {step.name}"
            fresh += _one(step, label, folder, state, prepare, again, observer)
        report = folder / "report.html"
        if fresh or not report.is_file():
            write_report(pipeline, folder, state)
    outputs = {step.name: state.steps[step.name].output for step in pipeline.steps}
    found = [
        vars(one)
        for step in pipeline.steps
        if step.command in TRAINING
        for one in figures(step.name, manifest.read(Path(outputs[step.name])))
    ]
    return {
        "folder": str(folder),
        "report": str(report),
        "done": fresh,
        "unchanged": len(pipeline.steps) - fresh,
        "steps": outputs,
        "figures": found,
    }


def check(
    pipeline: Pipeline, folder: Path, prepare: Prepare, again: str = "", observer: Observer | None = None
) -> dict[str, Any]:
    """Every step's settings, before hours are spent on the first ones; where each will write.

    Raises:
        UsageError: a setting is wrong; the step is named.
    """
    outputs: dict[str, str] = {}
    for step in pipeline.steps:
        outputs[step.name] = str(_place(step, folder))
        with _named(step.name):
            prepare(step.command, {**step.resolved(outputs), OUTPUTS[step.command]: outputs[step.name]})
    return {"folder": str(folder), "steps": outputs}


def _one(
    step: Step, label: str, folder: Path, state: State, prepare: Prepare, again: str, observer: Observer
) -> bool:
    """Run one step unless it is done; whether it ran."""
    needs = {name: state.steps[name].fingerprint for name in step.needs}
    written = step.resolved({name: f"${{{name}}}" for name in needs})
    wanted = fingerprint(step.command, written, needs)
    known = state.steps.get(step.name)
    same = known is not None and known.fingerprint == wanted
    if same and Path(known.output).exists() and _is_done(step, known):
        left = left_in(known.output)
        if known.left in ("", left):
            state.put(step.name, Done(**{**vars(known), "status": "done", "left": left}))
            observer.on_notice(f"{label}: done and unchanged")
            return False
        observer.on_warning(f"{label}: {known.output} is not what the step left there; it is done again")
        same = False
    output = known.output if same else str(_free(_place(step, folder)))
    settings = step.resolved({name: state.steps[name].output for name in needs})
    settings |= _where(step, output)
    _keep_recipe(step, settings, folder)
    state.put(step.name, Done(step.command, wanted, output, "running"))
    observer.on_notice(f"{label}: {step.command}")
    began = time.monotonic()
    with _named(step.name, again):
        prepare(step.command, settings)(observer)
    seconds = time.monotonic() - began
    state.put(step.name, Done(step.command, wanted, output, "done", seconds, left_in(output)))
    _free_memory()
    return True


def _is_done(step: Step, known: Done) -> bool:
    """A step that was killed between its last write and ours is done, too."""
    if step.command in TRAINING:
        return manifest.read(Path(known.output))["status"] == "done"
    return not Path(f"{known.output}.partial").exists()  # the others appear under their name when whole


def _where(step: Step, output: str) -> dict[str, Any]:
    """The options that say where a step writes, or that it goes on with what is there."""
    if step.command in TRAINING and (Path(output) / manifest.NAME).is_file():
        return {"resume": output}
    going_on = step.command == "infer" and Path(f"{output}.partial").exists()
    return {OUTPUTS[step.command]: output, **({"resume": True} if going_on else {})}


def _place(step: Step, folder: Path) -> Path:
    return folder / (step.name if OUTPUTS[step.command] == "output-dir" else f"{step.name}.jsonl")


def _free(path: Path) -> Path:
    """The path, or the same with a number behind it: what an earlier, different run left is kept."""
    for number in itertools.count(1):
        one = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not one.exists() and not one.with_name(f"{one.name}.partial").exists():
            return one
    raise AssertionError("unreachable")


def _keep_recipe(step: Step, settings: Mapping[str, Any], folder: Path) -> None:
    """Write the step's recipe, so that it can be run alone."""
    import yaml

    place = folder / "recipes" / f"{step.name}.yaml"
    private_folder(place.parent)
    content = {key: value for key, value in settings.items() if key != "resume"}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=10_000)
    atomic_write(place, f"# medgpt {step.command} --recipe {place.name}\n{text}")


@contextmanager
def _named(name: str, again: str = "") -> Any:
    """Errors say which step they come from and how to go on."""
    try:
        yield
    except MedgptError as error:
        error.message = f"step {name}: {error.message}"
        error.args = (error.message,)
        if again:
            own = "" if error.hint is None or error.hint.startswith("go on with") else f"{error.hint}; then "
            error.hint = f"{own}go on with: {again}"
        raise


@contextmanager
def _locked(folder: Path) -> Any:
    lock = FileLock(folder / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another process is working in {folder}", "wait for it to end, or name another --output-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
