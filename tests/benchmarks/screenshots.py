"""Pictures of the README, from real runs: `python tests/benchmarks/screenshots.py PIPELINE_FOLDER`.

docs/images/report.png is the pipeline's report in headless Chromium; docs/images/terminal.svg is the panel of
`medgpt sft` on the starter, read off a pseudo-terminal when it is half done.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

from medicalgpt_cli.engine.starter import SAMPLES
from tests.cli import ROOT, command, environment

IMAGES = ROOT / "docs" / "images"
COLUMNS, LINES = 100, 32


def report(folder: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("error: chromium is not installed")
    page, picture = folder.resolve() / "report.html", IMAGES / "report.png"
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1120,1500"]
    subprocess.run([chromium, *flags, f"--screenshot={picture}", f"file://{page}"], check=True)


def terminal() -> None:
    with tempfile.TemporaryDirectory() as place:
        samples = ("--train-data", SAMPLES / "sft.jsonl", "--eval-data", SAMPLES / "sft_dev.jsonl")
        words = command("sft", *samples, "--epochs", 2, "--learning-rate", "2e-3", "--output-dir", "runs/sft")
        screen = _screen_of(words, place, until="step 40/")
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: PTH123, SIM115
    used = max(number for number, line in enumerate(screen.display) if line.strip()) + 1
    for line in range(used):
        console.print(_line(screen.buffer[line]))
    console.save_svg(str(IMAGES / "terminal.svg"), title="medgpt sft --train-data sft.jsonl")


def _screen_of(words: list[str], place: str, until: str) -> pyte.Screen:
    """Run a program on a pseudo-terminal and stop it when its screen shows `until`."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    child, master = pty.fork()
    if child == 0:
        os.chdir(place)
        sizes = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
        os.execvpe(words[0], words, environment(sizes))
    last, seen = time.monotonic() + 600, False
    while time.monotonic() < last:
        if select.select([master], [], [], 0.02 if seen else 1)[0]:
            stream.feed(os.read(master, 65536))
        elif seen:  # the panel is whole: nothing more is coming for the moment
            break
        seen = seen or any(until in line for line in screen.display)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return screen


def _line(cells) -> Text:
    text = Text()
    for column in range(COLUMNS):
        cell = cells[column]
        if not cell.data:  # the right half of a wide character
            continue
        colour = None if cell.fg == "default" else f"#{cell.fg}" if len(cell.fg) == 6 else cell.fg
        colour = {"brown": "yellow"}.get(colour, colour)
        text.append(cell.data, f"{'bold ' if cell.bold else ''}{colour or ''}".strip() or None)
    text.rstrip()
    return text


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    report(Path(sys.argv[1]))
    terminal()
