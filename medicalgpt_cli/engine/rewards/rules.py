"""Rewards that need no model: answers that can be checked."""

from __future__ import annotations

import re
from collections.abc import Callable

from medicalgpt_cli.engine.data.prompts import Prompt

# What a person writes in front of the option that is meant, in English and Chinese.
_SAYS = re.compile(
    r"(?:answers?|options?|choices?|答案|选项|应选|选择|选)\s*(?:is|are|为|是)?\s*[:：]?\s*[(（【\[*\"“']*"
    r"((?:[A-Z](?![A-Za-z])[,，、和与&\s]*(?:and\s+)?)+)",
    re.IGNORECASE,
)
_OPENS = re.compile(r"^\s*[(（【\[*]*((?:[A-Z](?![A-Za-z])[,，、\s]*)+)(?:[.．)）:：】\]*、。]|\s|$)")


def stated_options(answer: str, letters: str) -> tuple[str, ...] | None:
    """The option letters that an answer settles on, sorted; None where it names none.

    A letter counts behind a word such as "answer" or 答案 (the last such place counts, since reasoning may come
    first), or at the very beginning of the answer.
    """
    said = [found for found in _SAYS.finditer(answer) if _letters(found[1], letters)]
    found = said[-1] if said else _OPENS.match(answer)
    named = _letters(found[1], letters) if found else ()
    return named or None


def _letters(text: str, letters: str) -> tuple[str, ...]:
    return tuple(sorted({one for one in text if one in letters}))


def right_option(prompt: Prompt, answer: str, tokens: int) -> float:
    """1 for exactly the right options, else 0."""
    return float(stated_options(answer, "".join(prompt.options or {})) == prompt.key)


def answer_format(prompt: Prompt, answer: str, tokens: int) -> float:
    """1 where the answer says which option it means, right or wrong, else 0."""
    return float(stated_options(answer, "".join(prompt.options or {})) is not None)


def length_rule(target: int) -> Callable[[Prompt, str, int], float]:
    """1 up to `target` tokens, then falling in proportion: 0.5 at twice the target. 0 for nothing said."""

    def rule(prompt: Prompt, answer: str, tokens: int) -> float:
        return min(target / tokens, 1.0) if answer.strip() and tokens else 0.0

    return rule
