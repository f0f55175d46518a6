"""How long a help page takes, beside other tools on the same machine in the same run.

    python tests/benchmarks/help_speed.py ["trl --help" "llamafactory-cli help" …]

Each command runs once unmeasured and then five times in turn; the median counts. A peer that is not
installed in this environment is given by its full path.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time

OURS = ("medgpt --help", "medgpt sft --help")


def seconds(command: str) -> float:
    began = time.perf_counter()
    subprocess.run(shlex.split(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - began


def main() -> None:
    commands = [*OURS, *sys.argv[1:]]
    for command in commands:
        seconds(command)
    rounds = [[seconds(command) for command in commands] for _ in range(5)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    for command, median in zip(commands, medians, strict=True):
        print(f"{median:8.3f} s   {median / medians[0]:6.1f} ×   {command}")


if __name__ == "__main__":
    main()
