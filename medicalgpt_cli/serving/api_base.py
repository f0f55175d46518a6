"""What all parts of a request share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(max_length=1 << 20)]


class Strict(BaseModel):
    """A field that is not declared is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        """A field that is null is one that was not sent, whatever its name: clients send all that they know."""
        if isinstance(sent, dict):
            return {name: value for name, value in sent.items() if value is not None}
        return sent
