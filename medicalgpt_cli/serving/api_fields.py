"""What a request of the API may say, as pydantic models: a field that is not here is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

WARMEST, COLDEST = 2.0, 0.01  # temperatures; 0 is greedy

Text = Annotated[str, Field(max_length=1 << 20)]
StopText = Annotated[str, Field(min_length=1, max_length=200)]


# What a conversation elsewhere may be made of, and what is said about it here.
_OTHER_PARTS = {"image_url", "image", "input_image", "input_audio", "audio", "audio_url", "video_url", "file"}
_OTHER_PARTS |= {"input_file", "input_text", "output_text", "refusal", "thinking", "tool_use", "tool_result"}
# Fields whose only value here is one that changes nothing, as it stands in a message that comes back.
NOT_TAKEN = {
    "tools": "this server calls no tools",
    "tool_calls": "this server calls no tools",
    "function_call": "this server calls no functions",
    "functions": "this server calls no functions",
    "tool_choice": "this server calls no tools",
    "audio": "this server reads and writes text, no audio",
    "modalities": "this server reads and writes text, nothing else",
    "name": "chat templates know no names of speakers: write the name into the text",
    "reasoning_content": "an earlier answer's reasoning is not read: leave it out",
    "reasoning": "an earlier answer's reasoning is not read: leave it out",
    "refusal": "a refusal is not read: put its text into content",
    "annotations": "citations are not read: leave them out",
    "response_format": "answers are plain text; another format cannot be promised",
    "role": "the roles are system, developer, user and assistant",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        """A field that is null is one that was not sent, whatever its name: clients send all that they know."""
        if isinstance(sent, dict):
            return {name: value for name, value in sent.items() if value is not None}
        return sent


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    # an answer of this server comes back with these
    refusal: Annotated[str, Field(max_length=0)] | None = None
    reasoning_content: Annotated[str, Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    name: None = None

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

    @property
    def plain(self) -> dict[str, str]:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class PlainText(_Strict):
    type: Literal["text"]


class Sampling(_Strict):
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
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None  # of no tools
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None
    store: Literal[False] | None = None

    @property
    def longest(self) -> int | None:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise Refused("max_tokens and max_completion_tokens contradict each other", "max_tokens")
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
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
