"""A signal ends every long command with a word and the right code, also while it is still being loaded."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli import command, environment, start
from tests.conftest import DATA
from tests.serving.running import free_port
from tests.tiny import tiny_model

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGUSR1: 143}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("signals")
    tiny_model(place / "model", seed=3)
    lines = (DATA / "medquad_en_dev.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (place / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (place / "text.txt").write_text("Fever is a sign.\n" * 50)
    (place / "questions.txt").write_text("Why?\n")
    return place


COMMANDS = {
    "sft": "sft --base-model model --train-data train.jsonl --output-dir sft",
    "pretrain": "pretrain --base-model model --train-data text.txt --output-dir pretrain",
    "infer": "infer --base-model model --data-file questions.txt --predictions-file out.json",
    "merge-lora": "merge-lora --lora-model model --output-dir merged",
    "serve-demo": "serve-demo --base-model model --port 0",
    "pull": "pull smollm2-135m",
    "sft-2": "sft --base-model model --train-data train.jsonl --output-dir two --processes 2",
}


def loaded(process: subprocess.Popen, library: str) -> None:
    """Wait until a process, or one that it started, has a library's file in its memory."""
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        ids = [process.pid, *_children(process.pid)]
        if any(library in _maps(one) for one in ids):
            return
        time.sleep(0.02)
    raise AssertionError(f"{library} was not loaded")


def _maps(number: int) -> str:
    try:
        return Path(f"/proc/{number}/maps").read_text()
    except OSError:
        return ""


def _listens(number: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    status = Path(f"/proc/{number}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def _children(number: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    except OSError:
        return []


def stop(process: subprocess.Popen, number: signal.Signals) -> None:
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == CODES[number], (process.returncode, err)
    assert "error: stopped" in err and number.name in err and "Traceback" not in err, err


# torch's own library is loaded for seconds, and everything that is imported behind it comes later
@pytest.mark.parametrize(
    ("name", "number"),
    [("sft", signal.SIGUSR1), ("infer", signal.SIGHUP), ("sft-2", signal.SIGUSR1)],
)
def test_a_signal_while_libraries_are_imported(place, name, number):
    process = start(*_arguments(name), cwd=place)
    loaded(process, "libtorch_cpu")
    stop(process, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("seconds", [0, 0.5, 2, 5])
def test_a_signal_at_any_moment_of_the_start(place, name, number, seconds):
    """From the first line of the program; what is done before the signal comes is done."""
    process = start(*_arguments(name), cwd=place)
    try:
        while process.poll() is None and not _listens(process.pid):
            time.sleep(0.005)
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode in (0, 2, 3, CODES[number]), (process.returncode, err)
    if process.returncode == CODES[number]:
        assert "error: " in err and "stopped" in err and "Traceback" not in err, err
    for one in ("sft", "pretrain", "two"):
        subprocess.run(["rm", "-rf", place / one], check=True)


def _arguments(name: str) -> list[str]:
    return COMMANDS[name].replace("--port 0", f"--port {free_port()}").split()


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_server_ends_cleanly_at_every_signal(place, number):
    process = start(*_arguments("serve-demo"), cwd=place, stdin=subprocess.DEVNULL)
    for line in process.stderr:
        if "http://" in line:
            break
    stop(process, number)


def test_training_that_starts_itself_anew_loses_no_signal(place):
    """Between the two programs a signal would kill without a word; it waits for the second one instead."""
    env = environment()
    del env["GLIBC_TUNABLES"]
    program = (
        "import os, signal, sys; from medicalgpt_cli.engine.run import signals; signals.hold_back(); "
        "os.kill(os.getpid(), signal.SIGUSR1); "
        "os.execv(sys.executable, [sys.executable, '-m', 'medicalgpt_cli', 'sft'])"
    )
    done = subprocess.run(
        [command()[0], "-c", program], env=env, cwd=place, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (143, "error: stopped by SIGUSR1\n")


def test_what_nohup_ignores_stays_ignored(place):
    script = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command("pull", "--list", "--json")]
    process = subprocess.Popen(script, env=environment(), stdout=subprocess.PIPE, text=True, cwd=place)
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(out)["models"]


def test_a_swallowed_signal_is_not_unsaid():
    """A library that catches everything while it is imported cannot make a stop undone."""
    program = (
        "import os, signal, sys; sys.argv = ['medgpt', 'env', '--json']; from medicalgpt_cli import app\n"
        "def swallowing(*_, **__):\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException: raise ImportError('a library that cannot be imported') from None\n"
        "app.app = swallowing; app.main()"
    )
    done = subprocess.run(
        [command()[0], "-c", program], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (143, "error: stopped by SIGTERM\n")
