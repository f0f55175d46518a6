"""Who gets in, from where, with what, and to which routes."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import httpx
import pytest

from medicalgpt_cli.errors import UnsafeRefused, UsageError
from medicalgpt_cli.serving import access as access_module
from medicalgpt_cli.serving import exchange as exchange_module
from medicalgpt_cli.serving import sockets as sockets_module
from medicalgpt_cli.serving.access import Access, Locked, read_users
from medicalgpt_cli.settings.stages import ServeSettings
from tests.serving.running import running
from tests.tiny import tiny_model

USERS = {"ana": "a-secret-of-ana-1", "bo": "a-secret-of-bo-22"}
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("guard") / "tiny", seed=3)


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, page=True) as one:
        yield one


@pytest.fixture
def locked_server(folder):
    with running(folder, users=USERS, page=True) as one:
        yield one


def test_only_names_of_this_server_are_answered(server):
    with server.client() as client:
        port = server.settings.port
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.nip.io",
            "192.168.1.5",
            "",
            "[::2]",
        ):
            assert client.get("/health", headers={"Host": host}).status_code == 421


def test_pages_of_other_origins_are_refused(server):
    with server.client() as client:
        own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
        assert client.post("/v1/chat/completions", json=ASK, headers=own).status_code == 200
        for foreign in (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": server.url.replace("127.0.0.1", "localhost")},
            {"Origin": server.url + "1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
        ):
            reply = client.post("/v1/chat/completions", json=ASK, headers=foreign)
            assert reply.status_code == 403, foreign
            assert not [name for name in reply.headers if name.startswith("access-control")]
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert client.get("/", headers=link).status_code == 200
        assert client.options("/v1/chat/completions").status_code == 404  # no preflight succeeds


DENIED = [
    *(f"/gradio_api/{one}" for one in ("upload", "file=/etc/passwd", "proxy=http://a.example", "queue/x", "run/x")),
    *(f"/gradio_api/{one}" for one in ("call/x", "component_server", "dev/reload", "runs", "mcp", "upload_progress")),
    *(f"/gradio_api/{one}" for one in ("process_recording", "vibe-code", "openapi.json", "user", "token", "app_id")),
    *("/monitoring", "/monitoring/summary", "/docs", "/redoc", "/file=/etc/passwd", "/pwa_icon", "/svelte/x.js"),
    *("/static/../../app.py", "/assets/..%2f..%2fapp.py", "/custom_component/a/b/c/d", "//", "/v1/", "/nothing"),
]  # fmt: skip


@pytest.mark.parametrize("path", DENIED)
def test_every_route_that_is_not_ours_is_denied(server, path):
    with server.client() as client:
        client.get("/")  # the cookie of a browser changes nothing
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert client.request(method, server.url + path).status_code in (404, 403), method


def test_headers_of_every_answer(server):
    with server.client() as client:
        for path in ("/", "/health", "/nothing", "/login"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe-eval" not in policy
            assert "script-src 'self' 'nonce-" in policy and "frame-ancestors 'none'" in policy
            assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
        page = client.get("/").text
        assert "<script>" not in page and "https://" not in page.split("gradio_config")[0]


def test_large_and_malformed_requests(server):
    with server.client() as client:
        large = client.post("/v1/chat/completions", content=b"x" * (exchange_module.MOST_BODY + 1))
        assert large.status_code == 413
        pieces = (b"x" * 65536 for _ in range(40))
        assert client.post("/v1/chat/completions", content=pieces).status_code == 413
    address = ("127.0.0.1", server.settings.port)
    for raw, status in (
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
        (b"NONSENSE\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", b""),
    ):
        with socket.create_connection(address, timeout=30) as one:
            one.sendall(raw)
            assert status in one.recv(100)


def test_slow_senders_are_closed_and_others_served(server, monkeypatch):
    monkeypatch.setattr(sockets_module, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(exchange_module, "BODY_SECONDS", 0.5)
    address = ("127.0.0.1", server.settings.port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
    openings = (b"", b"GET /he", head, head + b"\r\n{", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET")
    slow = []
    for opening in openings:
        slow.append(socket.create_connection(address, timeout=30))
        slow[-1].sendall(opening)
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    for one in slow:
        while one.recv(4096):  # ends: the server closed it
            pass
        one.close()


def test_a_reader_who_does_not_read_is_let_go(server, monkeypatch):
    monkeypatch.setattr(sockets_module, "SEND_SECONDS", 0.5)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.connect(("127.0.0.1", server.settings.port))
        one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        time.sleep(3)
        received = b""
        try:
            while piece := one.recv(1 << 20):
                received += piece
        except ConnectionResetError:
            pass
    assert received.count(b"HTTP/1.1 200") < 1000
    assert server.client().get("/health").status_code == 200


# -- secrets -----------------------------------------------------------------------------------------------


def test_the_api_needs_a_secret(locked_server):
    with locked_server.client() as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
            right = {"Authorization": f"Bearer {USERS['bo']}"}
            assert client.get(path, headers=right).status_code == 200
        assert client.post("/v1/chat/completions", json=ASK).status_code == 401


def test_a_browser_logs_in_and_out(locked_server):
    with locked_server.client() as client:
        first = client.get("/")
        assert (first.status_code, first.headers["location"]) == (303, "/login")
        assert client.get("/config").status_code == 401
        form = {"name": "ana", "secret": USERS["ana"]}
        for wrong in ({**form, "secret": USERS["bo"]}, {**form, "name": "eve"}, {}):
            assert client.post("/login", data=wrong).status_code == 401
        welcome = client.post("/login", data=form)
        assert welcome.status_code == 303
        cookie = welcome.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and USERS["ana"] not in cookie
        assert client.get("/").status_code == 200 and client.get("/v1/models").status_code == 200
        stolen = dict(client.cookies)
        client.post("/logout")
        with locked_server.client(cookies=stolen) as thief:
            assert thief.get("/config").status_code == 401


def test_repeated_wrong_secrets_lock_the_address(locked_server):
    wrong = {"Authorization": "Bearer guess-guess-guess"}
    with locked_server.client() as client:
        seen = [client.get("/v1/models", headers=wrong).status_code for _ in range(6)]
        assert seen == [401] * 5 + [429]
        right = {"Authorization": f"Bearer {USERS['ana']}"}
        reply = client.get("/v1/models", headers=right)
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 30
        assert client.post("/login", data={"name": "ana", "secret": USERS["ana"]}).status_code == 429
        # who claims to come from elsewhere is not believed without --behind-proxy
        elsewhere = {**wrong, "X-Forwarded-For": "10.1.2.3", "Forwarded": "for=10.1.2.3"}
        assert client.get("/v1/models", headers=elsewhere).status_code == 429


def test_behind_a_proxy_the_client_is_locked_and_not_the_proxy(folder):
    name = "medgpt.example.org"
    with (
        running(folder, users=USERS, behind_proxy=True, allowed_host=(name,)) as server,
        server.client() as client,
    ):
        proxied = {"Host": name, "X-Forwarded-Proto": "https", "X-Forwarded-For": "10.1.2.3"}
        wrong = {**proxied, "Authorization": "Bearer guess-guess-guess"}
        assert [client.get("/v1/models", headers=wrong).status_code for _ in range(6)][-1] == 429
        other = {**wrong, "X-Forwarded-For": "10.1.2.4"}
        assert client.get("/v1/models", headers=other).status_code == 401
        form = {"name": "ana", "secret": USERS["ana"]}
        own = {**proxied, "Origin": f"https://{name}", "X-Forwarded-For": "10.1.2.5"}
        welcome = client.post("/login", data=form, headers=own)
        assert welcome.status_code == 303 and "Secure" in welcome.headers["set-cookie"]


def test_names_lock_later_than_addresses_and_all_is_forgotten(monkeypatch):
    access = Access(USERS)
    for number in range(20):
        assert access.by_name("ana", "wrong", f"10.0.0.{number}") is None
    with pytest.raises(Locked):
        access.by_name("ana", USERS["ana"], "10.0.1.1")
    assert access.by_name("bo", USERS["bo"], "10.0.1.1") == "bo"
    later = time.monotonic() + 7200
    monkeypatch.setattr(access_module, "time", SimpleNamespace(monotonic=lambda: later))
    assert access.by_name("ana", USERS["ana"], "10.0.1.1") == "ana"


def test_tables_stay_small(monkeypatch):
    monkeypatch.setattr(access_module, "_MANY", 100)
    access = Access(USERS)
    for number in range(500):
        access.by_name(f"x{number}", "wrong", f"10.0.{number // 200}.{number % 200}")
        access.may_use(f"session{number}", access.open_browser(""))
    assert max(map(len, (access._failures, access._browsers, access._sessions))) == 100


def test_a_session_belongs_to_one_browser(server):
    hash_ = "stolen1234"
    with server.client() as owner, server.client() as thief:
        for one in (owner, thief):
            assert one.get("/").status_code == 200
        body = {"data": [], "fn_index": 0, "session_hash": hash_}
        assert owner.post("/gradio_api/cancel", json={**body, "event_id": "x"}).status_code == 200
        for reply in (
            thief.get("/gradio_api/queue/data", params={"session_hash": hash_}),
            thief.get(f"/gradio_api/heartbeat/{hash_}"),
            thief.post("/gradio_api/queue/join", json=body),
            thief.post("/gradio_api/cancel", json={**body, "event_id": "x"}),
            thief.post("/gradio_api/queue/join", json={**body, "session_hash": ["a"]}),
            thief.post("/gradio_api/queue/join", json={"data": []}),
            thief.get("/gradio_api/queue/data"),
        ):
            assert reply.status_code == 403
    with httpx.Client(trust_env=False) as stranger:
        assert stranger.get(f"{server.url}/gradio_api/queue/data?session_hash={hash_}").status_code == 401


# -- settings ----------------------------------------------------------------------------------------------


def test_another_host_needs_somebody_to_say_who_may_come(tmp_path):
    with pytest.raises(UnsafeRefused, match="lets other machines in") as refused:
        ServeSettings(host="0.0.0.0")
    assert refused.value.exit_code == 4
    assert ServeSettings(host="0.0.0.0", no_auth=True).local is False
    assert ServeSettings(host="::1").local and ServeSettings(host="127.0.0.2").local
    with pytest.raises(UsageError, match="contradict"):
        ServeSettings(no_auth=True, auth_file=tmp_path / "x")


def test_the_auth_file(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("# people\nana: a-secret-of-ana-1\n\nbo:a-secret:of-bo-22\n")
    path.chmod(0o644)
    with pytest.raises(UnsafeRefused, match="others can read it"):
        read_users(path)
    path.chmod(0o600)
    assert read_users(path) == {"ana": "a-secret-of-ana-1", "bo": "a-secret:of-bo-22"}
    for text in ("", "ana\n", "ana:short\n", ":a-secret-of-ana-1\n", "a:abcdefghijkl\nb:abcdefghijkl\n"):
        path.write_text(text)
        with pytest.raises(UsageError) as refused:
            read_users(path)
        assert "abcdefghijkl" not in str(refused.value)  # a secret is not shown
    with pytest.raises(UsageError, match="No such file"):
        read_users(tmp_path / "nothing")
