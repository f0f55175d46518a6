"""Two people have logged in: nothing that one of them sends shows, or stops, what the other asked."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import httpx
import pytest

from tests.serving.running import running
from tests.serving.test_api import until
from tests.tiny import tiny_model

USERS = {"ana": "a-secret-of-ana-1", "bo": "a-secret-of-bo-22"}
CANARY = "CANARY-7391-fever"
HERS, HIS = "hers1234", "his56789"  # the names of two pages, which each of them knows


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("two") / "tiny", seed=3)
    with running(folder, users=USERS, page=True, max_new_tokens=2000) as one:
        yield one


def log_in(server: Any, name: str) -> httpx.Client:
    client = server.client()
    assert client.post("/login", data={"name": name, "secret": USERS[name]}).status_code == 303
    return client


@pytest.fixture(scope="module")
def ana(server):
    client = log_in(server, "ana")
    yield client
    client.close()


@pytest.fixture(scope="module")
def bo(server):
    client = log_in(server, "bo")
    yield client
    client.close()


def ask(client: httpx.Client, question: str, session: str, *, tokens: int = 4) -> str:
    """What the page sends when a question is asked. Returns the number of the answer."""
    config = client.get("/config").json()
    [box] = [one["id"] for one in config["components"] if one["props"].get("elem_id") == "medgpt-question"]
    submit = next(one for one in config["dependencies"] if [box, "submit"] in map(list, one["targets"]))
    values = {one["id"]: one["props"].get("value") for one in config["components"]}
    data = [values.get(one) for one in submit["inputs"]]
    names = {one["id"]: one["props"].get("label") for one in config["components"]}
    longest = [place for place, one in enumerate(submit["inputs"]) if "longest" in str(names[one])]
    data[longest[0]], data[submit["inputs"].index(box)] = tokens, question
    sent = {"data": data, "fn_index": submit["id"], "trigger_id": box, "session_hash": session}
    reply = client.post("/gradio_api/queue/join", json=sent)
    assert reply.status_code == 200, reply.text
    return reply.json()["event_id"]


def said(client: httpx.Client, session: str) -> str:
    """What the page is told until its answers are over."""
    return client.get("/gradio_api/queue/data", params={"session_hash": session}).text


def raw(server: Any, target: str, *headers: str, body: bytes = b"", method: str = "GET") -> str:
    """What comes back, the stream's first moment included, for a request as it stands here."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{server.settings.port}", *headers, "", ""]
    came = b""
    with socket.create_connection(("127.0.0.1", server.settings.port), timeout=30) as one:
        one.sendall("\r\n".join(lines).encode("latin-1") + body)
        try:
            while piece := one.recv(65536):
                came += piece
                one.settimeout(0.2)  # an answer that is there comes at once
                if not came.startswith((b"HTTP/1.1 2", b"HTTP/1.1 1")):
                    break
        except TimeoutError:
            pass
    return came.decode("utf-8", "replace")


DATA = "/gradio_api/queue/data"
QUERIES = [
    f"{DATA}?session_hash={HIS}&session_hash={HERS}",
    f"{DATA}?session_hash={HERS}&session_hash={HIS}",
    f"{DATA}?session_hash={HERS}",
    f"{DATA}?session_hash={HIS}&session%5Fhash={HERS}",
    f"{DATA}?session%5Fhash={HIS}&session_hash={HERS}",
    f"{DATA}?session_hash={HIS}&%73ession_hash={HERS}",
    f"{DATA}?session_hash={HIS};session_hash={HERS}",
    f"{DATA}?session_hash={HIS}%26session_hash={HERS}",
    f"{DATA}?session_hash={HIS}&session_hash[]={HERS}",
    f"{DATA}?session_hash[]={HIS}&session_hash={HERS}",
    f"{DATA}?session_hash=&session_hash={HERS}",
    f"{DATA}?session_hash&session_hash={HERS}",
    f"{DATA}?session_hash={HIS}&SESSION_HASH={HERS}",
    f"{DATA}?session_hash={HIS}&+session_hash={HERS}",
    f"{DATA}?session_hash={HIS}&session+hash={HERS}",
    f"{DATA}?session_hash={HIS}&session.hash={HERS}",
    f"{DATA}?session_hash={HIS}&session-hash={HERS}",
    f"{DATA}?session_hash={HIS},{HERS}",
    f"{DATA}?session_hash={HIS}%00{HERS}",
    f"{DATA}?session_hash={HIS}&x=1?session_hash={HERS}",
    f"{DATA}?x=%ff&session_hash={HERS}",
    f"{DATA}%3Fsession_hash={HERS}?session_hash={HIS}",
    f"{DATA}?session_hash={HERS}&session_hash={HERS}",
    f"{DATA}?session_hash={HIS}" + "".join(f"&a{number}=" for number in range(200)) + f"&session_hash={HERS}",
]
PATHS = [
    f"{path}?session_hash={HERS}"
    for path in (
        "/gradio_api/queue%2Fdata",
        "/gradio_api/queue/%64ata",
        "/gradio_api/queue//data",
        "//gradio_api/queue/data",
        "/gradio_api/./queue/data",
        "/gradio_api/queue/../queue/data",
        "/gradio_api/%2e%2e/gradio_api/queue/data",
        "/gradio_api/queue/data/",
        "/gradio_api/queue/data.",
        "/gradio_api/queue/data;x=1",
        "/gradio_api/Queue/data",
        "/GRADIO_API/queue/data",
        "/gradio_api/queue/data%20",
        "/gradio_api/queue/data%00",
        "/gradio_api/queue/data%0a",
        "/gradio_api\\queue\\data",
        "/assets/..%2fgradio_api/queue/data",
        "/assets/../gradio_api/queue/data",
        "/static/%252e%252e/gradio_api/queue/data",
        "/gradio_api/heartbeat/../queue/data",
        "http://127.0.0.1/gradio_api/queue/data",
    )
]


@pytest.fixture
def waiting(ana, bo, server):
    """Her answer lies in the server, and her page has not fetched it yet; his page is there, too."""
    number = ask(ana, CANARY, HERS)
    ask(bo, "Why?", HIS)
    until(lambda: server.scheduler.load == {"waiting": 0, "running": 0})
    yield number
    assert CANARY in said(ana, HERS)  # it was there all the time, and is hers


def cookie(client: httpx.Client) -> str:
    [(name, value)] = dict(client.cookies).items()
    return f"{name}={value}"


def test_no_way_of_writing_a_query_or_a_path_shows_it(server, bo, waiting):
    shown = [one for one in QUERIES + PATHS if CANARY in raw(server, one, f"Cookie: {cookie(bo)}")]
    assert shown == []


def test_no_way_of_writing_headers_shows_it(server, ana, bo, waiting):
    his = cookie(bo)
    name, _, value = his.partition("=")
    her_query, his_query = f"{DATA}?session_hash={HERS}", f"{DATA}?session_hash={HIS}"
    tries = [
        (her_query, [f"Cookie: {his}", "X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1"]),
        (her_query, [f"Cookie: {his}", f"X-Original-URL: {her_query}", f"X-Rewrite-URL: {her_query}"]),
        (his_query, [f"Cookie: {his}", f"X-Original-URL: {her_query}", f"X-Rewrite-URL: {her_query}"]),
        (his_query, [f"Cookie: {his}", f"session_hash: {HERS}"]),
        (his_query, [f"Cookie: {his}; session_hash={HERS}"]),
        (her_query, [f"Cookie: {name}=x; {his}"]),
        (her_query, [f"Cookie: {his}; {name}=x"]),
        (her_query, [f"Cookie: {his}", f"Cookie: {name}=x"]),
        (her_query, [f'Cookie: {name}="{value}"']),
        (her_query, [f"Cookie: {name} = {value}"]),
        (her_query, [f"Cookie: {name}="]),
        (her_query, [f"Authorization: Bearer {USERS['bo']}", f"Cookie: {his}"]),
        (her_query, [f"Authorization: Bearer {USERS['bo']}"]),
        (her_query, [f"Cookie: {his}", "Host: localhost"]),
        (her_query, [f"Cookie: {his}", "Transfer-Encoding: chunked", "Content-Length: 5"]),
    ]
    assert [headers for target, headers in tries if CANARY in raw(server, target, *headers)] == []
    repeated = [f"Cookie: {cookie(ana)}", f"Cookie: {his}"]
    assert raw(server, his_query, *repeated).startswith("HTTP/1.1 400")
    for one in ("Origin", "Authorization", "Sec-Fetch-Site", "Content-Type", "X-Forwarded-Proto"):
        reply = raw(server, "/health", f"{one}: a", f"{one.lower()}: b")
        assert reply.startswith("HTTP/1.1 400"), one
    assert raw(server, "/health", "Accept: a", "Accept: b").startswith("HTTP/1.1 200")


def test_no_body_asks_or_stops_in_the_name_of_the_other(server, ana, bo, waiting):
    config = bo.get("/config").json()["dependencies"]
    plain = {"data": [], "fn_index": config[0]["id"], "session_hash": HERS, "event_id": waiting}
    twice = json.dumps({**plain, "session_hash": HIS})[:-1] + f', "session_hash": "{HERS}"}}'
    first = f'{{"session_hash": "{HERS}", ' + json.dumps({**plain, "session_hash": HIS})[1:]
    escaped = json.dumps({**plain, "session_hash": HIS})[:-1] + f', "\\u0073ession_hash": "{HERS}"}}'
    right = json.dumps({**plain, "session_hash": HIS})
    form = f"session_hash={HIS}&session_hash={HERS}"
    kind = "application/json"
    bodies: list[tuple[bytes, str, dict[str, str]]] = [
        (json.dumps(plain).encode(), kind, {}),
        *((text.encode(), kind, {}) for text in (twice, first, escaped)),
        (right.encode("utf-16"), kind, {}),
        (right.encode("utf-8-sig"), kind, {}),
        (right.encode("utf-16"), f"{kind}; charset=utf-16", {}),
        (right.encode(), f"{kind}; charset=utf-7", {}),
        (right.encode(), "text/plain", {}),
        (right.encode(), "multipart/form-data; boundary=x", {}),
        (right.encode(), f"{kind}, text/plain", {}),
        (right.encode(), kind, {"Content-Encoding": "gzip"}),
        (form.encode(), "application/x-www-form-urlencoded", {}),
        (right.replace("[]", "[1e999]").encode(), kind, {}),
        (right.replace("[]", "[NaN]").encode(), kind, {}),
    ]
    for route in ("join", "cancel"):
        path = f"/gradio_api/{'queue/' if route == 'join' else ''}{route}"
        for content, content_type, more in bodies:
            headers = {"Content-Type": content_type, **more}
            reply = bo.post(path, content=content, headers=headers)
            assert reply.status_code in (400, 403, 415), (route, content, content_type)
    # a query beside the body means nothing: he speaks in his own page alone
    sent = json.loads(right) | {"fn_index": 10**6}
    # gradio fails at that number, and the server then closes the connection: the next request takes another one
    bo.post(f"/gradio_api/queue/join?session_hash={HERS}", json=sent, headers={"Connection": "close"})
    for name, text in (("name=ana&secret=x&name=bo", 400), ("name=bo&secret=x;secret=y", 401)):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        assert bo.post("/login", content=name, headers=headers).status_code == text


def test_his_page_cannot_stop_her_answer(server, ana, bo):
    number = ask(ana, "Tell me everything", HERS, tokens=2000)
    until(lambda: server.scheduler.load["running"] == 1)
    stop = {"fn_index": 0, "event_id": number}
    for session in (HIS, HERS):
        assert bo.post("/gradio_api/cancel", json={**stop, "session_hash": session}).status_code == 403
    assert bo.post("/gradio_api/reset", json={"event_id": number}).json() == {"success": True}
    assert server.scheduler.load["running"] == 1
    assert ana.post("/gradio_api/cancel", json={**stop, "session_hash": HERS}).status_code == 200
    until(lambda: server.scheduler.load == {"waiting": 0, "running": 0})
    said(ana, HERS)


def test_the_name_that_gradio_knows_is_no_name_for_a_browser(server, ana, bo, waiting):
    """It is made of the browser's cookie, which alone would be enough if the table were full."""
    server.access._sessions.clear()
    assert CANARY not in raw(server, f"{DATA}?session_hash={HERS}", f"Cookie: {cookie(bo)}")
    behind = server.access.name_behind(HERS, dict(ana.cookies).popitem()[1])
    assert CANARY not in raw(server, f"{DATA}?session_hash={behind}", f"Cookie: {cookie(bo)}")
    server.access._sessions.clear()


def test_every_route_of_gradio_with_a_session_or_an_event(server, bo, waiting):
    """Listed from the gradio that is installed: a new version's new route is denied until somebody looks at it."""
    import gradio

    with gradio.Blocks() as blocks:
        gradio.Textbox()
    document = gradio.routes.App.create_app(blocks).openapi()
    schemas = json.dumps(document["components"]["schemas"])
    assert "CancelBody" in schemas and "PredictBody" in schemas
    found = 0
    for path, methods in document["paths"].items():
        target = re.sub(r"\{session_hash\}", HERS, re.sub(r"\{event_id\}", waiting, path))
        target = re.sub(r"\{\w+\}", "1", target)
        for method in methods:
            sent = {"session_hash": HERS, "event_id": waiting, "fn_index": 0, "data": []}
            sent |= {"component_id": 1, "fn_name": "x"}
            body = json.dumps(sent).encode()
            headers = [f"Cookie: {cookie(bo)}", "Content-Type: application/json"]
            if method == "post":
                headers.append(f"Content-Length: {len(body)}")
            query = f"?session_hash={HERS}&event_id={waiting}&upload_id=1"
            content = body if method == "post" else b""
            reply = raw(server, target + query, *headers, body=content, method=method.upper())
            assert CANARY not in reply, (method, path)
            if re.search("session_hash|event_id", path):
                found += 1
                assert reply.split()[1] in ("403", "404"), (method, path)
    assert found >= 6


def test_a_field_that_is_named_twice_is_refused_by_the_api_too(server, bo):
    for body in (
        '{"model": "tiny", "max_tokens": 1, "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}',
        '{"model": "tiny", "messages": [{"role": "user", "content": "a", "content": "b"}]}',
    ):
        reply = bo.post(
            "/v1/chat/completions", content=body, headers={"Content-Type": "application/json; charset=UTF-8"}
        )
        assert reply.status_code == 400 and "twice" in reply.json()["error"]["message"]
