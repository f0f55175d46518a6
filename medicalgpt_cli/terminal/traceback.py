"""The traceback of `--debug`: where an error arose, without the words of a record that it arose over."""

from __future__ import annotations

import traceback
from pathlib import Path

import medicalgpt_cli
from medicalgpt_cli.errors import MedgptError

_PACKAGE = str(Path(medicalgpt_cli.__file__).parent)
# Where records are in hand as text. Libraries that are called from here quote them in their errors.
_HANDLES_TEXT = tuple(
    f"{_PACKAGE}/{place}"
    for place in (
        "engine/data",
        "engine/evaluation",
        "engine/generation/conversation",
        "engine/generation/endpoint",
        "engine/generation/helpers",
        "engine/generation/infer",
        "engine/generation/predictions",
        "engine/generation/questions",
        "engine/pipeline/report",
        "engine/rewards",
        "engine/run",
        "engine/training/pretrain_data",
        "engine/training/reward_data",
        "engine/training/rl_data",
        "engine/training/sft_data",
        "serving",
        "terminal",
    )
)


def safe_traceback(error: BaseException) -> str:
    """The frames and kinds of an error and of those that led to it, the first one first.

    The text of a foreign error is left out where it, or one that led to it, arose in code that handles records or
    in a library that such code called: a key that is missing, a number that is none, what a template says are all
    quoted from the record.
    """
    chain = _chain(error, set())
    over_text = any(_last_of_ours(one).startswith(_HANDLES_TEXT) for one in chain)
    return "\nwhich led to:\n\n".join(_described(one, over_text) for one in chain)


def _chain(error: BaseException | None, seen: set[int]) -> list[BaseException]:
    if error is None or id(error) in seen:
        return []
    seen.add(id(error))
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return [*_chain(behind, seen), *(inner for one in members for inner in _chain(one, seen)), error]


def _last_of_ours(error: BaseException) -> str:
    """The file of this package that was the last on the way to an error; "" where none was."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return next((file for file in reversed(files) if file.startswith(_PACKAGE)), "")


def _described(error: BaseException, over_text: bool) -> str:
    kind = type(error)
    ours = isinstance(error, MedgptError) or (isinstance(error, OSError) and kind.__module__ == "builtins")
    text = "(its text may quote a record)" if over_text and not ours else str(error)
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{kind.__qualname__}: {text}\n"
