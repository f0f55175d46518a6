"""What a model thinks in front of its answer: apart from the answer in messages, between marks in a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Thinking = str  # "on" or "off": whether a template asks for reasoning; "auto" is its default

OPEN, CLOSE = "<think>", "</think>"
_SWITCHES = ("enable_thinking", "thinking")  # variables by which templates turn reasoning on and off
_TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")


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


def written_inline(reasoning: str, content: str) -> str:
    """Reasoning in front of an answer, in one text: how it is learnt where a template has no place for it."""
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{content}"


@dataclass(frozen=True)
class ReasoningFacts:
    """What a chat template does with reasoning, found by using it.

    way: "field", it renders the field of a message; "inline", it knows the marks in the content of a message;
    "stripped", it only takes away what stands between them, so that what a model writes is put together here; None, it
    has no place for reasoning.
    """

    way: Literal["field", "inline", "stripped"] | None
    open: str  # as it is rendered, with its line ends
    close: str
    switch: str | None = None  # the variable of the template that turns reasoning on and off
    opened: frozenset[Thinking] = (
        frozenset()
    )  # settings under which the prompt for an answer opens the reasoning
    closed: frozenset[Thinking] = frozenset()  # and under which it has closed it already


NO_REASONING = ReasoningFacts(None, OPEN + "\n", f"\n{CLOSE}\n\n")


def variables(facts: ReasoningFacts, thinking: Thinking) -> dict[str, bool]:
    """What the template is told: nothing where its default is asked for."""
    return {} if thinking == "auto" or facts.switch is None else {facts.switch: thinking == "on"}


def find_reasoning(
    render: Callable[..., str], header: str, source: str, spelt: Collection[str]
) -> ReasoningFacts:
    """
    Args:
        render: renders messages, "" where the template refuses them. header: what stands between the generation prompt
            and an answer. source: of the template. spelt: added tokens of the tokenizer.
    """
    question: Mapping[str, Any] = {"role": "user", "content": "a"}
    switch = next((one for one in _SWITCHES if _switches(render, question, one)), None)
    settings: tuple[Thinking, ...] = ("auto", "on", "off") if switch else ("auto",)
    asked = render(question)
    prompts = {
        one: render(question, generation=True, **({} if one == "auto" else {str(switch): one == "on"}))
        for one in settings
    }
    way, opens, closes = _place(render, question, asked, prompts["auto"], header, source, spelt)
    tails = {one: prompt.removeprefix(asked).rstrip() for one, prompt in prompts.items()}
    opened = frozenset(one for one, tail in tails.items() if tail.endswith(opens.strip()))
    last = closes.split()[0]
    closed = frozenset(one for one, tail in tails.items() if tail.endswith(last) and opens.strip() in tail)
    return ReasoningFacts(way, opens, closes, switch, opened, closed)


def _switches(render: Callable[..., str], question: Mapping[str, Any], name: str) -> bool:
    on, off = (render(question, generation=True, **{name: value}) for value in (True, False))
    return bool(on) and bool(off) and on != off


def _place(
    render: Callable[..., str],
    question: Mapping[str, Any],
    asked: str,
    prompt: str,
    header: str,
    source: str,
    spelt: Collection[str],
) -> tuple[Literal["field", "inline", "stripped"] | None, str, str]:
    """How reasoning is handed over, and the marks around it."""
    answer = {"role": "assistant", "content": "Zc7"}
    whole = render(question, {**answer, "reasoning_content": "Zr7"})
    if "Zr7" in whole.partition("Zc7")[0]:
        before, _, rest = whole.partition("Zr7")
        opens = before.removeprefix(prompt) if before.startswith(prompt) else ""
        tag = _TAG.search(before)
        opens = opens if opens.strip() else before[tag.start() :] if tag else OPEN + "\n"
        gap = rest.partition("Zc7")[0]
        # Where an answer has a header of its own, that is no part of the mark that closes the reasoning.
        without = gap.rstrip().removesuffix(header) if header else gap
        closes = without if without.strip() and without != gap.rstrip() else gap
        if closes.strip():
            return "field", opens, closes
    tag = _TAG.search(prompt.removeprefix(asked))
    opens = (
        tag[0]
        if tag and _closing(tag[1]) in (*spelt, *re.findall(r"</[^<>\s]+>|\[/[^\[\]\s]+\]", source))
        else ""
    )
    space = "\n" if not opens or opens.endswith("\n") else ""
    opens = opens or OPEN + "\n"
    closes = f"{space}{_closing(opens.strip())}{space * 2}"
    inline = {**answer, "content": f"{opens}Zr7{closes}Zc7"}
    last, earlier = render(question, inline), render(question, inline, question, answer)
    if "Zc7" in last and "Zr7" not in last:
        return "stripped", opens, closes
    known = "Zr7" in last and "Zc7" in earlier and "Zr7" not in earlier
    return "inline" if known else None, opens, closes


def _closing(tag: str) -> str:
    return f"{tag[:1]}/{tag[1:]}"
