"""Run a script within limits of memory and processor time: `python -P limited.py BYTES SECONDS SCRIPT …`.

A script of its own, that imports nothing of medgpt: it starts in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import runpy
import sys

OUT_OF_MEMORY = 64  # the exit code

if __name__ == "__main__":
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    with contextlib.suppress(
        ImportError, ValueError, OSError
    ):  # a system without limits, or with narrower ones
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.argv = sys.argv[3:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)
