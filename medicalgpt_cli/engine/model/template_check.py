"""Whether a chat template does a bounded amount of work. It is a program, and comes with somebody's model."""

from __future__ import annotations

from pathlib import Path

from medicalgpt_cli.engine.model import template_child
from medicalgpt_cli.engine.run import bounded
from medicalgpt_cli.errors import UnsafeRefused, UsageError

SECONDS, MEMORY = 5, 512 * 1024 * 1024  # of processor time and address space, for some 200 conversations
_LARGEST = 1 << 20  # characters of a template; the longest in use have some 20,000
_SCRIPT = Path(template_child.__file__)
_HINT = "it comes with the model: take the model from somewhere else, or look at its chat template"


def check_template(template: str, tokens: dict[str, str], place: str) -> None:
    """Try a template out in a child process, once on a machine for each template.

    Args:
        tokens: the special tokens that a template may name. place: whose template it is.

    Raises:
        UsageError: it is no template.
        UnsafeRefused: it takes too long or too much memory, calls itself without end, or writes far more than it
            is given.
    """
    if len(template) > _LARGEST:
        raise UnsafeRefused(f"{place}: the chat template has more than {_LARGEST:,} characters", _HINT)
    question = {"template": template, "tokens": tokens}
    if bounded.passed_before(_SCRIPT, question):
        return
    try:
        problem = bounded.ask(_SCRIPT, question, memory=MEMORY, seconds=SECONDS)
    except bounded.OutOfBounds as bound:
        problem = f"it takes more than {bound} for short conversations"
    if isinstance(problem, int):
        raise UsageError(f"{place}: line {problem} of the chat template is not valid Jinja", _HINT)
    if problem:
        raise UnsafeRefused(f"{place}: the chat template is refused: {problem}", _HINT)
    bounded.remember(_SCRIPT, question)


def check_rendered(text: str, given: int) -> None:
    """
    Args:
        given: characters of the conversation.

    Raises:
        UnsafeRefused: the template wrote far more than it was given.
    """
    if len(text) > template_child.LONGEST + template_child.TIMES * given:
        raise UnsafeRefused(
            f"the chat template wrote {len(text):,} characters for a conversation of {given:,}", _HINT
        )
