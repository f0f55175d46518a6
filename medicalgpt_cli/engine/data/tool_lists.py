"""The tools of a record: which functions an assistant may call, as OpenAI, ShareGPT and others write them."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.data.counts import Place
from medicalgpt_cli.engine.data.fields import EMPTY, Fields, kind_of, object_of, text_of
from medicalgpt_cli.engine.data.turns import unused_of_function
from medicalgpt_cli.errors import DataError

_SHAPE = '[{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}]'


def read_tools(fields: Fields, left: list[tuple[Place, str]]) -> tuple[dict[str, Any], ...]:
    """The functions of `tools`: name, description and parameters (a JSON Schema) of each.

    Raises:
        DataError: they are no list of functions, or two have one name.
    """
    if "tools" not in fields:
        return ()
    value, name = fields.listed("tools"), fields.name("tools")
    if value in EMPTY:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{name} is {kind_of(value)}, not a list", _SHAPE, at=fields.at)
    return tools_of(value, name, fields.at, left)


def tools_of(
    value: list[Any], name: str, at: str, left: list[tuple[Place, str]] | None = None
) -> tuple[dict[str, Any], ...]:
    """The same of a list that came another way."""
    found: list[dict[str, Any]] = []
    for tool in value:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise DataError(f"an entry of {name} is no function with a name", _SHAPE, at=at)
        parameters = inner.get("parameters", inner.get("input_schema")) or {}
        if not isinstance(parameters, dict):
            raise DataError(f"parameters of a function of {name} is {kind_of(parameters)}", _SHAPE, at=at)
        description = inner.get("description")
        described = "" if description is None else text_of(description, "description", at)
        found.append(
            {
                "name": text_of(inner["name"], "name", at),
                "description": described,
                "parameters": object_of(parameters, "parameters", at),
            }
        )
        if left is not None:
            inside = {"name", "description", "parameters" if "parameters" in inner else "input_schema"}
            left += unused_of_function(tool, inner, {"function"}, inside)
    if len({one["name"] for one in found}) < len(found):
        raise DataError(f"two functions of {name} have one name", "names of functions have to differ", at=at)
    return tuple(found)
