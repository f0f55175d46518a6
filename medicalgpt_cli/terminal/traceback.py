"""The traceback of `--debug`: where an error arose, without the words of a record that it arose over."""

from __future__ import annotations

import traceback
from pathlib import Path

import medicalgpt_cli
from medicalgpt_cli.errors import MedgptError

_PACKAGE = Path(medicalgpt_cli.__file__).parent
# Where records are in hand as text. Libraries that are called from here quote them in their errors.
_HANDLES_TEXT = tuple(
    str(_PACKAGE / place)
    for place in (
        "engine/data",
        "engine/evaluation",
        "engine/generation",
        "engine/pipeline/report",
        "engine/rewards",
        "engine/training/pretrain_data",
        "engine/training/reward_data",
        "engine/training/rl_data",
        "engine/training/sft_data",
        "serving",
        "terminal/chat",
        "terminal/data_view",
    )
)


def safe_traceback(error: BaseException) -> str:
    """The frames and kinds of an error and of those that led to it, the first one first.

    The text of a foreign error is left out where one of them passed through code that handles records: a key
    that is missing, a number that is none, what a template says are all quoted from the record.
    """
    chain = _chain(error, set())
    over_text = any(
        frame.filename.startswith(_HANDLES_TEXT)
        for one in chain
        for frame in traceback.extract_tb(one.__traceback__)
    )
    return "\nwhich led to:\n\n".join(_described(one, over_text) for one in chain)


def _chain(error: BaseException | None, seen: set[int]) -> list[BaseException]:
    if error is None or id(error) in seen:
        return []
    seen.add(id(error))
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return [*_chain(behind, seen), *(inner for one in members for inner in _chain(one, seen)), error]


def _described(error: BaseException, over_text: bool) -> str:
    kind = type(error)
    ours = isinstance(error, MedgptError) or (isinstance(error, OSError) and kind.__module__ == "builtins")
    text = "(its text may quote a record)" if over_text and not ours else str(error)
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{frames}{kind.__qualname__}: {text}\n"
