"""What a request of the API may say, as pydantic models: a field that is not here is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.serving.api_base import Strict, Text
from medicalgpt_cli.serving.api_tools import MOST_TOOLS, MadeCall, TemplateSwitches, Tool

WARMEST, COLDEST = 2.0, 0.01  # temperatures; 0 is greedy

StopText = Annotated[str, Field(min_length=1, max_length=200)]


# What a conversation elsewhere may be made of, and what is said about it here.
_OTHER_PARTS = {"image_url", "image", "input_image", "input_audio", "audio", "audio_url", "video_url", "file"}
_OTHER_PARTS |= {"input_file", "input_text", "output_text", "refusal", "thinking", "tool_use", "tool_result"}
# Fields whose only value here is one that changes nothing, as it stands in a message that comes back.
NOT_TAKEN = {
    "function_call": "the older form of a call is not taken: use tools and tool_calls",
    "functions": "the older form of tools is not taken: use tools",
    "tool_choice": "a call can be left to the model (auto) or ruled out (none), not forced",
    "strict": "arguments that follow their schema cannot be promised: leave strict out",
    "audio": "this server reads and writes text, no audio",
    "modalities": "this server reads and writes text, nothing else",
    "refusal": "a refusal is not read: put its text into content",
    "annotations": "citations are not read: leave them out",
    "response_format": "answers are plain text; another format cannot be promised",
    "role": "the roles are system, developer, user, assistant and tool",
}


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)] | None = None
    # an answer of this server comes back with these
    refusal: Annotated[str, Field(max_length=0)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[MadeCall], Field(max_length=MOST_TOOLS)] | None = None
    function_call: None = None
    audio: None = None
    # of a tool's turn
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts_of_text(cls, content: Any) -> Any:
        """Says which part is not read, and of what kind it is where that is a known one."""
        for number, part in enumerate(content if isinstance(content, list) else (), 1):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                named = f" of type {kind}" if isinstance(kind, str) and kind in _OTHER_PARTS else ""
                raise PydanticCustomError(
                    "part", f"part {number}{named} is not read: this server takes parts of type text"
                )
        return content

    @field_validator("tool_calls", "reasoning_content", "reasoning", "tool_call_id", "name")
    @classmethod
    def _belongs_to_its_role(cls, value: Any, info: ValidationInfo) -> Any:
        role, field = info.data.get("role"), str(info.field_name)
        owner = "tool" if field in ("tool_call_id", "name") else "assistant"
        if value and role is not None and role != owner:
            speakers = "chat templates know no names of speakers: write the name into the text"
            raise PydanticCustomError(
                "role", speakers if field == "name" else f"it belongs to the role {owner}"
            )
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("missing_content", "content is missing")
        if self.role == "tool" and not self.tool_call_id:
            raise PydanticCustomError("role_field", "tool_call_id is missing: which call does this answer?")
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            raise PydanticCustomError("role_field", "reasoning and reasoning_content contradict each other")
        return self

    @property
    def plain(self) -> Message:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        found: Message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if reasoning := self.reasoning_content or self.reasoning:
            found["reasoning"] = reasoning
        if self.tool_calls:
            found["tool_calls"] = [call.plain for call in self.tool_calls]
        if self.tool_call_id:
            found["tool_call_id"] = self.tool_call_id
        if self.name:
            found["name"] = self.name
        return found


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class PlainText(Strict):
    type: Literal["text"]


class Sampling(Strict):
    """What both kinds of request say about the answer. The last block is accepted where it changes nothing."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=WARMEST)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    no_repeat_ngram: Annotated[int, Field(ge=0, le=1000)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def longest(self) -> int | None:
        return self.max_tokens


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: PlainText | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _tools_fit_together(self) -> ChatRequest:
        names = [one.function.name for one in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "tools: two functions have one name")
        if self.parallel_tool_calls is False and self.offered:
            raise PydanticCustomError(
                "tools", "parallel_tool_calls: how many tools are called at once is the model's choice"
            )
        known: set[str] = set()
        for number, message in enumerate(self.messages):
            known.update(call.id for call in message.tool_calls or ())
            if message.tool_call_id and message.tool_call_id not in known:
                raise PydanticCustomError(
                    "tools", f"messages.{number}.tool_call_id: no call before it has this id"
                )
        return self

    @property
    def offered(self) -> tuple[dict[str, Any], ...]:
        """The tools that may be called."""
        return () if self.tool_choice == "none" else tuple(one.plain for one in self.tools or ())

    @property
    def thinking(self) -> Thinking | None:
        """Whether reasoning is asked for; None where nothing is said about it."""
        switches = self.chat_template_kwargs
        try:
            return switches.chosen if switches else None
        except ValueError as problem:
            raise Refused(str(problem), "chat_template_kwargs") from None

    @property
    def longest(self) -> int | None:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise Refused("max_tokens and max_completion_tokens contradict each other", "max_tokens")
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    offered: ClassVar[tuple[dict[str, Any], ...]] = ()
    thinking: ClassVar[Thinking | None] = None

    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None


class Refused(Exception):
    """A request that is not carried out, in the words and with the status of OpenAI's errors."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.retry_after = retry_after


_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {429: "rate_limit_error", 503: "overloaded_error"}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
