"""The two sides of a request behind the guard: its body, and its answer with our headers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from medicalgpt_cli.serving.api_fields import error_body

MOST_BODY = 1 << 20
BODY_SECONDS = 10.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_CSP = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
    "worker-src 'self' blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
_SECURE = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), microphone=(), geolocation=()",
}


class Denied(Exception):
    """The guard answers by itself: a refusal, or a way to somewhere else."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def _too_large() -> Denied:
    return Denied(413, f"at most {MOST_BODY} bytes are taken", {"Connection": "close"})


class Body:
    """The request's body, read before anything else is done: bounded in size and time."""

    def __init__(self, headers: Mapping[str, str], receive: Receive):
        self._receive = receive
        self.content: bytes | None = None  # until it is read, and after it was handed on
        self._handed_on = False
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BODY:
            raise _too_large()

    async def read(self) -> None:
        """
        Raises:
            Denied: it is too large, or does not come in time.
        """
        try:
            async with asyncio.timeout(BODY_SECONDS):
                parts, size, more = [], 0, True
                while more:
                    message = await self._receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > MOST_BODY:
                        raise _too_large()
                    more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            raise Denied(408, "the request was not sent in time", {"Connection": "close"}) from None
        self.content = b"".join(parts)

    async def receive(self) -> dict[str, Any]:
        """What the application receives: the whole body at once, then the end of the connection."""
        if self.content is not None and not self._handed_on:
            self._handed_on = True
            return {"type": "http.request", "body": self.content, "more_body": False}
        return await self._receive()


class Answer:
    """The response: headers of ours, and the nonce in the page's scripts."""

    def __init__(self, send: Send, nonce: str):
        self._send, self.nonce = send, nonce
        self.started = False
        self.cookie: str | None = None
        self.rewrite = self.lasting = False
        self.on_body: Callable[[bytes], None] | None = None  # told what a short answer says
        self._held: dict[str, Any] | None = None
        self._page = b""

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [one for one in message["headers"] if not one[0].lower().startswith(b"access-control-")]
            message = {**message, "headers": headers + self._own()}
            if self.rewrite and message["status"] == 200:
                self._held = message
                return
            self.started = True
        elif self._held is not None:
            self._page += message.get("body", b"")
            if message.get("more_body"):
                return
            page = re.sub(rb"<script(?=[\s>])", b'<script nonce="' + self.nonce.encode() + b'"', self._page)
            page = re.sub(rb'<meta\s+(property|name)="(og|twitter):[^>]*>', b"", page)
            kept = [one for one in self._held["headers"] if one[0].lower() != b"content-length"]
            start = {**self._held, "headers": [*kept, (b"content-length", str(len(page)).encode())]}
            self._held, self.started = None, True
            await self._send(start)
            message = {**message, "body": page}
        elif self.on_body:
            self.on_body(message.get("body", b""))
        await self._send(message)

    def _own(self) -> list[tuple[bytes, bytes]]:
        own = dict(_SECURE)
        own[b"content-security-policy"] = _CSP.format(nonce=self.nonce).encode()
        own[b"cache-control"] = b"private, max-age=3600" if self.lasting else b"no-store"
        if self.cookie:
            own[b"set-cookie"] = self.cookie.encode()
        return list(own.items())

    async def refuse(self, problem: Denied) -> None:
        body = json.dumps(error_body(problem.status, problem.message)).encode()
        await self._whole(problem.status, b"application/json", body, problem.headers)

    async def json(self, body: bytes) -> None:
        await self._whole(200, b"application/json", body, {})

    async def html(self, text: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self._whole(status, b"text/html; charset=utf-8", text.encode(), headers or {})

    async def _whole(self, status: int, kind: bytes, body: bytes, headers: dict[str, str]) -> None:
        if self.started:
            raise asyncio.CancelledError  # half an answer is out: the connection ends here
        self.rewrite, self._held, self.started = False, None, True
        fields = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        fields += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": fields + self._own()})
        await self._send({"type": "http.response.body", "body": body})
