"""The real command: how it starts, what it writes, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time

import httpx
import pytest

from tests.cli import command, environment, medgpt, start
from tests.serving.running import free_port
from tests.tiny import tiny_model

CANARY = "CANARY-7391-fever"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("process") / "tiny", seed=3)


def wait_for(process: subprocess.Popen, url: str) -> None:
    for _ in range(600):
        try:
            httpx.get(f"{url}/health", trust_env=False)
            return
        except httpx.HTTPError:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_serves_logs_no_text_and_stops_cleanly(folder, number, code):
    port = free_port()
    process = start(
        "serve-demo", "--base-model", folder, "--port", port, "--use-cpu", "--max-new-tokens", 2000
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(process, url)
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            client.post("/v1/chat/completions", json={**body, "n": CANARY})
            client.get("/", params={"q": CANARY})
            session = {"session_hash": "abcdef123", "fn_index": 0}
            for data in ([CANARY], [CANARY, [{"role": CANARY}], CANARY], {"a": CANARY}, CANARY):
                client.post("/gradio_api/queue/join", json={**session, "data": data})
            client.post("/gradio_api/queue/join", json={**session, "fn_index": CANARY, "data": []})
            with client.stream(
                "POST", "/v1/chat/completions", json={**body, "max_tokens": 2000, "stream": True}
            ) as reply:
                next(reply.iter_text())
                process.send_signal(number)  # while an answer is being given
                out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert CANARY not in out + err and "Traceback" not in err
    assert f"http://127.0.0.1:{port}" in err and "error: stopped" in err
    with socket.socket() as one:  # the port is free again
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))


def test_a_busy_port_is_said_before_the_model_is_loaded(folder):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        done = medgpt("serve-demo", "--base-model", folder, "--port", port)
    assert done.returncode == 3
    assert f"port {port}" in done.stderr and f"--port {port + 1}" in done.stderr


def test_what_is_unsafe_is_refused(folder, tmp_path):
    done = medgpt("serve-demo", "--base-model", folder, "--host", "0.0.0.0")
    assert done.returncode == 4 and "--auth-file" in done.stderr
    users = tmp_path / "users"
    users.write_text("ana:a-secret-of-ana-1\n")
    users.chmod(0o644)
    done = medgpt("serve-demo", "--base-model", folder, "--auth-file", users, "--port", free_port())
    assert done.returncode == 4 and "others can read it" in done.stderr
    assert "a-secret" not in done.stderr
    assert medgpt("serve-demo", "--share").returncode == 2


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_it_needs_no_network(folder):
    """In a namespace of its own, where there is no network but the machine's own address."""
    port = free_port()
    inside = " ".join(command("serve-demo", "--base-model", folder, "--use-cpu", "--port", port))
    ask = (
        "import httpx, time, sys\n"
        "for _ in range(600):\n"
        "    try:\n"
        f"        reply = httpx.get('http://127.0.0.1:{port}/', trust_env=False)\n"
        "        break\n"
        "    except httpx.HTTPError: time.sleep(0.1)\n"
        f"body = {json.dumps({'model': 'tiny', 'messages': [{'role': 'user', 'content': 'Why?'}], 'max_tokens': 3})}\n"
        f"said = httpx.post('http://127.0.0.1:{port}/v1/chat/completions', json=body, trust_env=False)\n"
        "print(reply.status_code, said.status_code)\n"
    )
    script = (
        f'ip link set lo up; {inside} & server=$!; {command("")[0]} -c "$ASK"; kill $server; wait $server'
    )
    done = subprocess.run(
        ["unshare", "-rn", "bash", "-c", script],
        env=environment({"ASK": ask}),
        capture_output=True,
        text=True,
        timeout=200,
    )
    if "unshare" in done.stderr or "ip: command" in done.stderr:
        pytest.skip("this machine allows no network namespaces")
    assert done.stdout.strip() == "200 200", done.stderr
