"""What a model thinks in front of its answer: apart from the answer in messages, between marks in a text."""

from __future__ import annotations

from typing import Literal

Thinking = Literal[
    "auto", "on", "off"
]  # whether a template asks for reasoning; auto is the template's default

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(content: str) -> tuple[str | None, str]:
    """Reasoning that stands inline in front of an assistant's answer, and the answer without it.

    `<think>…</think>` has to open the text; with or without line ends around it. Where only `</think>` is there, what
    stands in front of it is the reasoning: such answers were written behind a prompt that had opened the block already.

    Returns:
        (None, content) where there is none. An empty block is no reasoning, and is taken away. A block that is never
        closed is left as it is: nobody can say where the answer begins.
    """
    before, closed, answer = content.partition(CLOSE)
    inside = before.lstrip()
    if not closed or OPEN in inside.removeprefix(OPEN):
        return None, content
    return inside.removeprefix(OPEN).strip() or None, answer.lstrip()
