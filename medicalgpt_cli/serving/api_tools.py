"""What a request says about tools, and what a reply says of the calls in an answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from medicalgpt_cli.engine.data.fields import object_of
from medicalgpt_cli.engine.data.messages import ToolCall
from medicalgpt_cli.engine.data.readers import parse_json
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.serving.api_base import Strict, Text

MOST_TOOLS = 128
_LARGEST = 1 << 16  # characters of one tool as JSON
_Name = Annotated[str, Field(min_length=1, max_length=128)]


class Function(Strict):
    name: _Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None

    @field_validator("parameters")
    @classmethod
    def _bounded(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        return parameters if parameters is None else _checked(parameters, "it")


class Tool(Strict):
    type: Literal["function"]
    function: Function

    @field_validator("function")
    @classmethod
    def _small(cls, function: Function) -> Function:
        if len(function.model_dump_json()) > _LARGEST:
            raise PydanticCustomError("size", f"a tool may have {_LARGEST} characters")
        return function

    @property
    def plain(self) -> dict[str, Any]:
        function = self.function
        return {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {},
        }


class CalledFunction(Strict):
    name: _Name
    arguments: Text = "{}"

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, arguments: str) -> str:
        try:
            value = parse_json(arguments) if arguments.strip() else {}
        except DataError as problem:
            raise PydanticCustomError(
                "json", f"the text of a JSON object is expected: {problem.message}"
            ) from None
        if not isinstance(value, dict):
            raise PydanticCustomError("json", "the text of a JSON object is expected")
        _checked(value, "it")
        return arguments


class MadeCall(Strict):
    """A call in an earlier answer."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, Field(ge=0)] | None = None  # as a stream says it, and some clients send it back

    @property
    def plain(self) -> ToolCall:
        arguments = parse_json(self.function.arguments) if self.function.arguments.strip() else {}
        return {"id": self.id, "name": self.function.name, "arguments": arguments}


class TemplateSwitches(Strict):
    """`chat_template_kwargs` as vLLM and SGLang take it: templates call the switch of reasoning by one of two names."""

    enable_thinking: bool | None = None
    thinking: bool | None = None

    @property
    def chosen(self) -> Literal["on", "off"] | None:
        named = {one for one in (self.enable_thinking, self.thinking) if one is not None}
        if len(named) == 2:
            raise ValueError("enable_thinking and thinking contradict each other")
        return None if not named else "on" if named.pop() else "off"


def _checked(value: Any, name: str) -> dict[str, Any]:
    """
    Raises:
        PydanticCustomError: the object cannot be rendered.
    """
    try:
        return object_of(value, name, "")
    except DataError as problem:
        raise PydanticCustomError("json", problem.message) from None
