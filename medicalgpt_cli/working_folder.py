"""Nothing that lies in the working folder is imported as if it were a library.

People work where their data is, and data comes from other people. Python puts the working folder in front of all
libraries for `python -m` and `python -c`, and for an empty entry of PYTHONPATH: a `pip.py` or `typer.py` that lies
there would be run. Imported before anything else, so that it takes only what Python has loaded already.
"""

# ruff: noqa: PTH100, PTH117, PTH120, PTH121

from __future__ import annotations

import os
import sys

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_STANDARD = os.path.dirname(os.path.abspath(os.__file__))


def python(*arguments: str) -> list[str]:
    """The command of a further interpreter, which leaves the working folder out (-P)."""
    return [sys.executable, "-P", *arguments]


def environment() -> dict[str, str]:
    """The variables of a further interpreter: neither it nor what it starts looks into the working folder."""
    found = {**os.environ, "PYTHONSAFEPATH": "1"}
    entries = found.pop("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in entries if os.path.isabs(entry) and (entry == _OURS or not _is_here(entry))]
    if not sys.flags.safe_path and _is_here(_OURS) and _OURS not in kept:
        kept.append(
            _OURS
        )  # a checkout of medgpt that was started in place: what it starts is the same program
    return {**found, "PYTHONPATH": os.pathsep.join(kept)} if kept else found


def leave_working_folder() -> None:
    """Take the working folder off `sys.path`, here and for every interpreter that this one starts.

    Where it holds medgpt itself (a checkout) or Python's own library, it stays, behind everything else.
    """
    os.environ.update(found := environment())
    if "PYTHONPATH" not in found:
        os.environ.pop("PYTHONPATH", None)
    found_here = any(map(_is_here, sys.path))
    needed = [folder for folder in (_OURS, _STANDARD) if found_here and _is_here(folder)]
    sys.path[:] = [entry for entry in sys.path if os.path.isabs(entry) and not _is_here(entry)] + needed


def _is_here(folder: str) -> bool:
    """Whether this is the working folder, under whatever name; an empty name is."""
    try:
        return os.path.samefile(folder or os.curdir, os.curdir)
    except OSError:
        return False
