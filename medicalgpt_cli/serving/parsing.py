"""What a request says, read once. What two readers could read differently is refused, and never passed on.

The guard decides on these values, and what stands behind it gets these values and not the bytes that came: a name
that is said twice, of which one reader takes the first value and another the last, has no way through.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl

from medicalgpt_cli.serving.exchange import Denied

# Lists by their definition, and nothing here decides on them; uvicorn joins the lines of X-Forwarded-For.
_LISTS = {"accept", "accept-charset", "accept-encoding", "accept-language", "cache-control", "pragma", "via"}
_LISTS |= {"connection", "te", "forwarded", "x-forwarded-for", "warning", "if-none-match"}
_MOST_FIELDS = 100


def header_fields(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers by their names in small letters.

    Raises:
        Denied: one that has a single value comes twice, `Host` is missing, or the body has two lengths.
    """
    found: dict[str, str] = {}
    for name, value in ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in raw):
        if name in found and name not in _LISTS:
            raise _malformed()
        found[name] = f"{found[name]}, {value}" if name in found else value
    if "host" not in found or {"content-length", "transfer-encoding"} <= found.keys():
        raise _malformed()
    return found


def _malformed() -> Denied:
    return Denied(400, "malformed headers", {"Connection": "close"})


def cookie_value(header: str, name: str) -> str | None:
    """The value of one cookie, as it stands.

    Raises:
        Denied: the name comes twice.
    """
    pairs = [part.strip().partition("=") for part in header.split(";")]
    values = [value.strip() for found, sign, value in pairs if sign and found.strip() == name]
    if len(values) > 1:
        raise Denied(400, f"the cookie {name} came twice: delete this site's cookies")
    return values[0] if values else None


def parameters(content: bytes) -> dict[str, str]:
    """The fields of a query or of a form.

    Raises:
        Denied: a name comes twice, or this is no such text in UTF-8.
    """
    try:
        pairs = parse_qsl(
            content.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(content),
            errors="strict",
            max_num_fields=_MOST_FIELDS,
        )
    except ValueError:
        raise Denied(400, "malformed parameters") from None
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Denied(400, "a parameter came twice")
    return found


def json_value(content: bytes) -> Any:
    """What a JSON body says.

    Raises:
        Denied: it is not JSON in UTF-8, holds a number that JSON has not, or names a field of an object twice.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Denied(400, "the body is not valid JSON") from None


def json_bytes(value: Any) -> bytes:
    """The same in one spelling.

    Raises:
        Denied: a number was too large for JSON, or the nesting too deep.
    """
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Denied(400, "the body is not valid JSON") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Denied(400, "the body names a field twice")
    return found


def _no_number(_: str) -> None:
    raise ValueError("NaN and Infinity are not JSON")


def check_kind(headers: dict[str, str], kind: str) -> None:
    """Whether a body is of the media type that is read here.

    Raises:
        Denied: it says to be something else, in another character set, or compressed.
    """
    given, _, more = headers.get("content-type", "").lower().partition(";")
    if given.strip() != kind or more.replace(" ", "").replace('"', "") not in ("", "charset=utf-8"):
        raise Denied(415, f"send the body as {kind} in UTF-8")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Denied(415, "send the body without a content encoding")
