"""Try a chat template out: `template_child.py` within limits, a question on standard input, an answer on output.

A script of its own, that imports nothing of medgpt (engine/run/bounded.py). The environment is the one in which
transformers renders templates, as far as it matters for how much they do.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

LONGEST, TIMES = (
    1 << 20,
    16,
)  # a conversation may become so many characters, and beyond that so many times its own
_MOST_ROUNDS = 10_000  # of loops over numbers that stand in the template, one inside the other
_LARGEST_FACTOR = 100_000

_TEXTS = (
    "a",
    "",
    "你好，发烧 39 度？",
    "<think>\nx\n</think>\n\ny",
    "What is it? " * 1000,
    '{"name": "f"}',
    "zzz",
)


def conversations() -> Iterator[list[dict[str, str]]]:
    """Of one turn and of many, with and without a system message, of short and of long texts."""
    for text in _TEXTS:
        yield [{"role": "user", "content": text}]
        for system, turns in itertools.product((False, True), (2, 3, 4, 5, 6, 7, 8, 40)):
            said = [{"role": ("user", "assistant")[number % 2], "content": text} for number in range(turns)]
            yield [*([{"role": "system", "content": text}] if system else []), *said]
    yield [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]


def with_tools() -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Conversations in which tools are called, with the variables that a template gets beside them."""
    for text, number in itertools.product(("a", "你好 " * 200), (1, 2, 8)):
        schema = {"type": "object", "properties": {f"k{at}": {"type": "string"} for at in range(number)}}
        function = {"name": "f", "description": text, "parameters": schema}
        call = {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "f", "arguments": {f"k{at}": text for at in range(number)}},
        }
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": text},
            {"role": "tool", "content": text, "name": "f", "tool_call_id": "abcdefghi"},
        ]
        for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            yield turns * number, {"tools": [{"type": "function", "function": function}] * number, **thinking}


def refusal(source: str, tokens: dict[str, str]) -> str | int | None:
    """Why a template is not to be rendered, or the line at which it is none; None where nothing is wrong.

    Errors of its own it may raise.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tree = _environment().parse(source)
        if problem := _written_down(tree, 1):
            return problem
        template = _environment().from_string(source)
    except RecursionError:
        return "it is nested too deeply"
    except TemplateSyntaxError as problem:
        return problem.lineno
    except TemplateError:
        return None
    for messages, more in itertools.chain(((one, {}) for one in conversations()), with_tools()):
        size = _size([messages, more])
        for generation in (False, True):
            try:
                written = template.render(
                    messages=messages, add_generation_prompt=generation, **tokens, **more
                )
            except RecursionError:
                return "it calls itself without end"
            except MemoryError:
                raise
            except Exception:
                continue
            if len(written) > LONGEST + TIMES * size:
                return f"it writes {len(written):,} characters for a conversation of {size:,}"
    return None


def _size(value: Any) -> int:
    """Characters in all texts of a value."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_size, inner))


def _written_down(node: Any, rounds: int) -> str | None:
    """What its text alone gives away, in branches that no conversation above may reach."""
    from jinja2 import nodes

    if isinstance(node, nodes.Pow):
        return "it raises numbers to a power"
    if isinstance(node, nodes.Mul) and _largest(node) > _LARGEST_FACTOR:
        return f"it multiplies by more than {_LARGEST_FACTOR:,}"
    if isinstance(node, nodes.For) and isinstance(node.iter, nodes.Call):
        called = node.iter.node
        if isinstance(called, nodes.Name) and called.name == "range":
            rounds *= max(_largest(node.iter), 1)
    if rounds > _MOST_ROUNDS:
        return f"it loops more than {_MOST_ROUNDS:,} times"
    return next((found for one in node.iter_child_nodes() if (found := _written_down(one, rounds))), None)


def _largest(node: Any) -> int:
    from jinja2 import nodes

    numbers = [one.value for one in node.iter_child_nodes() if isinstance(one, nodes.Const)]
    return max((abs(int(one)) for one in numbers if isinstance(one, int | float)), default=0)


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(refusal(asked["template"], asked["tokens"])))
