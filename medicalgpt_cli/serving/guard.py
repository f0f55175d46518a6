"""What stands in front of every route: addresses, origins, sizes, times, identity, and the list of routes there are.

Written against ASGI itself, so that nothing behind it, gradio's own routes included, is reached any other way.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from medicalgpt_cli.serving import login
from medicalgpt_cli.serving.access import Access, Locked
from medicalgpt_cli.serving.exchange import Answer, Body, Denied, Receive, Scope, Send
from medicalgpt_cli.serving.parsing import (
    check_kind,
    cookie_value,
    header_fields,
    json_bytes,
    json_value,
    parameters,
)

_MOST_AT_ONCE = 512  # requests in work, streams of the page included
_LOG = logging.getLogger("medgpt.serving")

_API = {
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
}
_OPEN = {("GET", "/health"), ("GET", "/login"), ("POST", "/login")}
# What gradio's page asks for; every other route of gradio's (files, uploads, proxy, runs, monitoring) is denied.
_PAGE = {
    ("GET", "/"),
    ("POST", "/logout"),
    ("GET", "/config"),
    ("GET", "/theme.css"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/startup-events"),
    ("GET", "/gradio_api/queue/data"),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/cancel"),
    ("POST", "/gradio_api/reset"),
}
_MODEL = re.compile(r"/v1/models/.{1,500}")
_STATIC = re.compile(r"/(assets|static|medgpt)/[A-Za-z0-9_.\-/@]+|/favicon\.ico|/manifest\.json")
_HEARTBEAT = re.compile(r"(/gradio_api/heartbeat/)([A-Za-z0-9]+)")
# What the application behind is told; who asks and from where is the guard's to read, and said in the scope.
_PASSED_ON = {"host", "accept", "accept-encoding", "accept-language", "user-agent", "range", "if-range"}
_PASSED_ON |= {"if-none-match", "if-modified-since"}


@dataclass
class _Visit:
    """A request that is being judged."""

    scope: Scope
    headers: dict[str, str]
    cookie: str | None
    sent: Any = None  # a JSON body
    new_cookie: str | None = None

    @property
    def route(self) -> tuple[str, str]:
        method = "GET" if self.scope["method"] == "HEAD" else self.scope["method"]
        return method, self.scope["path"]

    @property
    def address(self) -> str:
        return (self.scope.get("client") or ("?", 0))[0]


class Guard:
    """ASGI middleware around the whole application.

    Args:
        hosts: names under which the server may be asked, without port.
        any_address: whether a numeric address is right, too; a foreign page cannot make a browser use one
            under a name of its own.
        on_page_closed: called with the session of a page that is gone.
    """

    def __init__(
        self,
        app: Any,
        access: Access,
        *,
        hosts: Iterable[str],
        any_address: bool,
        port: int,
        on_page_closed: Callable[[str], None] = lambda session: None,
    ):
        self.app, self.access = app, access
        self.on_page_closed = on_page_closed
        self.hosts, self.any_address = {host.lower() for host in hosts}, any_address
        self.cookie_name = (
            f"medgpt_{port}"  # cookies do not know ports: two servers on a machine need two names
        )
        self.at_once = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        answer = Answer(send, secrets.token_urlsafe(16))
        try:
            visit = self._visit(scope)
            if self.at_once >= _MOST_AT_ONCE and visit.route != ("GET", "/health"):
                raise Denied(503, "too many requests at once", {"Retry-After": "2"})
            self.at_once += 1
            try:
                await self._judge(visit, receive, answer)
            finally:
                self.at_once -= 1
        except Denied as problem:
            await answer.refuse(problem)
        except Exception as problem:
            # The text of a foreign exception may quote what was sent; its kind and place do not.
            frame = problem.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f"{frame.tb_frame.f_globals.get('__name__')}:{frame.tb_lineno}" if frame else "?"
            _LOG.error("%s at %s", type(problem).__name__, where)
            await answer.refuse(Denied(500, "something went wrong in the server"))

    def _visit(self, scope: Scope) -> _Visit:
        headers = header_fields(scope["headers"])
        return _Visit(scope, headers, cookie_value(headers.get("cookie", ""), self.cookie_name))

    async def _judge(self, visit: _Visit, receive: Receive, answer: Answer) -> None:
        self._check_host(visit)
        self._check_origin(visit)
        static = visit.route[0] == "GET" and _is_static(visit.route[1])
        beating = _HEARTBEAT.fullmatch(visit.route[1]) if visit.route[0] == "GET" else None
        api = visit.route in _API or (visit.route[0] == "GET" and _MODEL.fullmatch(visit.route[1]))
        if not api and visit.route not in _OPEN | _PAGE and not static and not beating:
            raise Denied(404, "there is nothing here")
        body = Body(visit.headers, receive)
        if visit.route[0] == "POST":
            await body.read()
        state = visit.scope.setdefault("state", {})
        state["client"] = f"address {visit.address}"
        if visit.route[1] in ("/login", "/logout"):
            await self._log_in_or_out(visit, body, answer)
            return
        session = None
        if api:
            state["client"] = self._caller(visit)
            self._read_json(visit, body)
        elif visit.route not in _OPEN:
            state["client"] = self._browser(visit)
            if visit.route == ("POST", "/gradio_api/reset"):
                # gradio's would stop anybody's answer by its number; /cancel has done what the page means
                await answer.json(b'{"success": true}')
                return
            if not static and visit.route != ("GET", "/"):
                self._read_json(visit, body)
                session = self._own_session(visit, beating)
            if visit.route == ("POST", "/gradio_api/cancel") and not self._stops_its_own(visit):
                await answer.json(b'{"success": true}')  # nobody asked for that: there is nothing to stop
                return
        self._pass_on(visit, body, session, beating)
        if visit.route == ("GET", "/"):
            answer.rewrite = True
        if visit.route == ("POST", "/gradio_api/queue/join"):
            answer.on_body = functools.partial(self._note_event, visit.cookie or "")
        if visit.new_cookie:
            answer.cookie = self._cookie(visit, visit.new_cookie)
        answer.lasting = bool(static)
        try:
            await self.app(visit.scope, body.receive, answer.send)
        finally:
            if beating and session:  # a page holds this request open for as long as it is there
                self.on_page_closed(session)

    # -- what is asked for -------------------------------------------------------------------------------------

    def _read_json(self, visit: _Visit, body: Body) -> None:
        if visit.route[0] == "POST" and body.content is not None:
            check_kind(visit.headers, "application/json")
            visit.sent = json_value(body.content)

    def _own_session(self, visit: _Visit, beating: re.Match[str] | None) -> str | None:
        """gradio gives a session to whoever knows its name: here it belongs to one browser.

        Returns:
            Its name behind the guard, or None where the route has none.
        """
        if beating:
            session: object = beating[2]
        elif visit.route == ("GET", "/gradio_api/queue/data"):
            session = parameters(visit.scope["query_string"]).get("session_hash")
        elif visit.route[0] == "POST":
            session = visit.sent.get("session_hash") if isinstance(visit.sent, dict) else None
        else:
            return None
        cookie = visit.cookie or ""
        if not self.access.may_use(session, cookie):
            raise Denied(403, "this session belongs to another browser")
        return self.access.name_behind(str(session), cookie)

    def _stops_its_own(self, visit: _Visit) -> bool:
        """gradio stops any answer by its number: here it has to be one that this browser asked for."""
        asked_by = self.access.asked_by(visit.sent.get("event_id"))
        if asked_by not in (None, visit.cookie):
            raise Denied(403, "this answer belongs to another browser")
        return asked_by is not None

    def _pass_on(self, visit: _Visit, body: Body, session: str | None, beating: re.Match[str] | None) -> None:
        """Say to the application what was read here, and nothing else of what came."""
        scope, query = visit.scope, b""
        if session and beating:
            scope["path"] = beating[1] + session
        elif session and visit.route[0] == "GET":
            query = f"session_hash={session}".encode()
        elif session:
            visit.sent["session_hash"] = session
        kept = {name: value for name, value in visit.headers.items() if name in _PASSED_ON}
        if visit.route in (("GET", "/"), ("POST", "/gradio_api/queue/join")):
            kept.pop("accept-encoding", None)  # these answers are read here, so they may not be compressed
        if body.content is not None:
            body.content = json_bytes(visit.sent)
            kept |= {"content-type": "application/json", "content-length": str(len(body.content))}
        scope["query_string"], scope["raw_path"] = query, quote(scope["path"]).encode()
        scope["headers"] = [(name.encode(), value.encode("latin-1")) for name, value in kept.items()]

    def _note_event(self, cookie: str, answer: bytes) -> None:
        """The number under which a browser may stop the answer that it has just asked for."""
        try:
            event = json.loads(answer)["event_id"]
        except (ValueError, KeyError, TypeError):
            return  # a refusal
        self.access.note_event(event, cookie)

    # -- where a request comes from ----------------------------------------------------------------------------

    def _check_host(self, visit: _Visit) -> None:
        """Against DNS rebinding: a foreign name that is made to point here is not ours."""
        name = _host_name(visit.headers["host"])
        if name in self.hosts:
            return
        if self.any_address:
            try:
                ipaddress.ip_address(name.strip("[]"))
            except ValueError:
                pass
            else:
                return
        raise Denied(421, "this server is not known under that name (--allowed-host NAME)")

    def _check_origin(self, visit: _Visit) -> None:
        """Against pages of other origins that make a browser ask here."""
        origin = visit.headers.get("origin")
        if origin is not None:
            scheme, _, place = origin.partition("://")
            if scheme not in ("http", "https") or place.lower() != visit.headers["host"].lower():
                raise Denied(403, "asked from a page of another origin")
        site = visit.headers.get("sec-fetch-site", "same-origin")
        navigates = visit.headers.get("sec-fetch-mode") == "navigate" and visit.route[0] == "GET"
        if site not in ("same-origin", "none") and not navigates:
            raise Denied(403, "asked from a page of another origin")

    # -- who asks ----------------------------------------------------------------------------------------------

    def _caller(self, visit: _Visit) -> str:
        """Who uses the API: a secret as bearer token, or a browser that has logged in."""
        kind, _, secret = visit.headers.get("authorization", "").partition(" ")
        if self.access.users is None:
            return f"address {visit.address}"
        try:
            if kind.lower() == "bearer" and secret.strip():
                name = self.access.by_secret(secret.strip(), visit.address)
            else:
                name = self.access.browser(visit.cookie)
        except Locked as problem:
            raise _locked(problem) from None
        if name is None:
            raise Denied(401, "a secret of the auth file is needed", {"WWW-Authenticate": "Bearer"})
        return f"user {name}"

    def _browser(self, visit: _Visit) -> str:
        """Whose page it is; a browser that is not known yet is sent to the login, or given a cookie."""
        name = self.access.browser(visit.cookie)
        if name is None:
            if visit.route != ("GET", "/"):
                raise Denied(401, "load the page anew")
            if self.access.users is not None:
                raise Denied(303, "log in first", {"Location": "/login"})
            visit.new_cookie = self.access.open_browser("")
            visit.cookie = visit.new_cookie
        return f"user {name}" if name else f"browser {visit.cookie}"

    async def _log_in_or_out(self, visit: _Visit, body: Body, answer: Answer) -> None:
        if visit.route == ("POST", "/logout"):
            self.access.close_browser(visit.cookie)
            answer.cookie = self._cookie(visit, "", seconds=0)
            raise Denied(303, "logged out", {"Location": "/login" if self.access.users else "/"})
        if self.access.users is None:
            raise Denied(303, "nobody has to log in here", {"Location": "/"})
        if visit.route[0] == "GET":
            await answer.html(login.page())
            return
        if body.content:
            check_kind(visit.headers, "application/x-www-form-urlencoded")
        form = parameters(body.content or b"")
        name, secret = (form.get(key, "") for key in ("name", "secret"))
        try:
            known = self.access.by_name(name, secret, visit.address)
        except Locked as problem:
            await answer.html(login.page(locked=True), 429, {"Retry-After": str(int(problem.seconds) + 1)})
            return
        if known is None:
            await answer.html(login.page(wrong=True), 401)
            return
        answer.cookie = self._cookie(visit, self.access.open_browser(known))
        raise Denied(303, "welcome", {"Location": "/"})

    def _cookie(self, visit: _Visit, value: str, seconds: int = 12 * 3600) -> str:
        secure = "; Secure" if visit.scope["scheme"] == "https" else ""
        return f"{self.cookie_name}={value}; Path=/; HttpOnly; SameSite=Lax; Max-Age={seconds}{secure}"


def _is_static(path: str) -> bool:
    return _STATIC.fullmatch(path) is not None and not {"", ".", ".."} & set(path.split("/")[1:])


def _host_name(host: str) -> str:
    """Without the port, in small letters."""
    host = host.strip().lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _locked(problem: Locked) -> Denied:
    return Denied(429, "too many wrong secrets", {"Retry-After": str(int(problem.seconds) + 1)})
