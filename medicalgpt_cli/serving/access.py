"""Who may come in: names and secrets, browsers that have logged in, and whose a page's session is."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt_cli.errors import UnsafeRefused, UsageError

# Wrong secrets after which an address is locked; a name later, since a stranger could lock its owner out.
_FAILURES = {"address": 5, "name": 20}
_LOCKED_SECONDS = 60.0  # doubled with each further failure, an hour at most
_LONGEST_LOCK = 3600.0
_FORGOTTEN_SECONDS = 3600.0  # without a failure
_BROWSER_SECONDS = 12 * 3600.0
_MANY = 20_000  # entries of each table; the oldest make room
_SESSION = re.compile(r"[A-Za-z0-9]{6,64}")


def read_users(path: Path) -> dict[str, str]:
    """Names and secrets of an `--auth-file`: a line `name:secret` each; blank lines and # lines are skipped.

    Raises:
        UsageError: it cannot be read, or a line is not of this form. The line is named, not shown.
        UnsafeRefused: other users of the machine can read it.
    """
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"--auth-file {path}: {getattr(problem, 'strerror', None) or 'not text'}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise UnsafeRefused(f"--auth-file {path}: others can read it", f"chmod 600 {path}")
    users: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, secret = line.partition(":")
        name, secret = name.strip(), secret.strip()
        if not colon or not name or len(secret) < 12:
            raise UsageError(
                f"{path}:{number}: expected name:secret, the secret of 12 characters or more",
                "python3 -c 'import secrets; print(secrets.token_urlsafe(24))' makes one",
            )
        if name in users or secret in users.values():
            raise UsageError(f"{path}:{number}: this name or secret stands twice", "each has to be different")
        users[name] = secret
    if not users:
        raise UsageError(f"--auth-file {path}: nobody is in it", "add a line name:secret")
    return users


class Locked(Exception):
    """Too many wrong secrets. `seconds`: until the next may be tried."""

    def __init__(self, seconds: float):
        super().__init__("too many wrong secrets")
        self.seconds = seconds


@dataclass
class _Failures:
    count: int = 0
    last: float = 0.0
    until: float = 0.0


@dataclass
class Access:
    """Names and secrets, compared in constant time; locked for a while after repeated failures.

    `users` None: everybody may come in, and a browser is told from another by its cookie alone.
    """

    users: dict[str, str] | None
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    _failures: OrderedDict[tuple[str, str], _Failures] = field(default_factory=OrderedDict)
    _browsers: OrderedDict[str, tuple[str, float]] = field(default_factory=OrderedDict)
    _sessions: OrderedDict[str, str] = field(default_factory=OrderedDict)
    _events: OrderedDict[str, str] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._digests = {name: self._digest(secret) for name, secret in (self.users or {}).items()}

    def _digest(self, text: str) -> bytes:
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()

    # -- secrets -----------------------------------------------------------------------------------------------

    def by_secret(self, secret: str, address: str) -> str | None:
        """The name that a secret belongs to, or None. All are compared, whichever it is.

        Raises:
            Locked: too many wrong secrets came from this address.
        """
        place = ("address", address)
        self._must_be_open(place)
        given, found = self._digest(secret), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        if found is None:
            self._note_failure(place)
        return found

    def by_name(self, name: str, secret: str, address: str) -> str | None:
        """The name, if the secret is its own.

        Raises:
            Locked: too many wrong secrets came from this address, or for this name.
        """
        places = (("address", address), ("name", name[:100]))
        for place in places:
            self._must_be_open(place)
        right = hmac.compare_digest(self._digest(secret), self._digests.get(name, self._key))
        if not right:
            for place in places:
                self._note_failure(place)
        return name if right else None

    def _must_be_open(self, place: tuple[str, str]) -> None:
        failures = self._failures.get(place)
        left = failures.until - time.monotonic() if failures else 0
        if left > 0:
            raise Locked(left)

    def _note_failure(self, place: tuple[str, str]) -> None:
        now = time.monotonic()
        failures = self._failures.setdefault(place, _Failures())
        self._failures.move_to_end(place)
        failures.count = 1 if now - failures.last > _FORGOTTEN_SECONDS else failures.count + 1
        failures.last = now
        over = failures.count - _FAILURES[place[0]]
        if over >= 0:
            failures.until = now + min(_LOCKED_SECONDS * 2 ** min(over, 10), _LONGEST_LOCK)
        _bounded(self._failures)

    # -- browsers ----------------------------------------------------------------------------------------------

    def open_browser(self, name: str) -> str:
        """A cookie for a browser; it is known by this alone."""
        cookie = secrets.token_urlsafe(32)
        self._browsers[cookie] = (name, time.monotonic() + _BROWSER_SECONDS)
        _bounded(self._browsers)
        return cookie

    def browser(self, cookie: str | None) -> str | None:
        """The name of the browser that has this cookie, or None."""
        name, until = self._browsers.get(cookie or "", ("", 0.0))
        if until < time.monotonic():
            self._browsers.pop(cookie or "", None)
            return None
        return name

    def close_browser(self, cookie: str | None) -> None:
        self._browsers.pop(cookie or "", None)

    def may_use(self, session: object, cookie: str) -> bool:
        """Whether a page's session belongs to this browser. The first who uses a session owns it."""
        if not isinstance(session, str) or not _SESSION.fullmatch(session):
            return False
        owner = self._sessions.setdefault(session, cookie)
        self._sessions.move_to_end(session)
        _bounded(self._sessions)
        return hmac.compare_digest(owner, cookie)

    def name_behind(self, session: str, cookie: str) -> str:
        """The name of a browser's session behind the guard.

        It is made from both, so that one browser's session stays out of another's reach even where the table has
        forgotten whose it is.
        """
        return self._digest(f"{cookie}/{session}").hex()[:32]

    def note_event(self, event: str, cookie: str) -> None:
        """This browser asked for the answer with this number."""
        self._events[event] = cookie
        _bounded(self._events)

    def asked_by(self, event: object) -> str | None:
        """The cookie of the browser that asked for the answer with this number; None for an unknown one."""
        return self._events.get(event) if isinstance(event, str) else None


def _bounded(table: OrderedDict) -> None:
    while len(table) > _MANY:
        table.popitem(last=False)
