"""Many at once, impatient and ill-meaning ones among them: `pytest -m slow -s tests/serving/test_load.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import psutil
import pytest

from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.cli import environment, start
from tests.serving.running import free_port, running
from tests.serving.test_process import wait_for
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
CANARY = re.compile(r"canary-(\d+)-")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("load") / "tiny", seed=3)


@pytest.fixture
def process(folder):
    """A server of its own, whose memory can be measured: (url, process)."""
    port = free_port()
    limits = ("--max-batch", 8, "--max-queue", 32, "--max-client-requests", 1000, "--max-new-tokens", 200)
    one = start("serve-demo", "--base-model", folder, "--port", port, "--use-cpu", *limits)
    url = f"http://127.0.0.1:{port}"
    wait_for(one, url)
    yield url, psutil.Process(one.pid)
    one.terminate()
    assert one.wait(30) == 143


def test_fifty_users_and_twenty_turns_on_the_page_and_the_api(folder):
    """Each user has words of their own; no answer, stream or page of another may show them."""
    limits = {"max_new_tokens": 8, "max_queue": 200, "max_context": 2048}
    with running(folder, page=True, **limits) as server:
        asyncio.run(asyncio.wait_for(_all_users(server), 1500))
        counters = server.scheduler.counters
        print(f"{counters.finished} answers, mean batch {counters.rows / counters.steps:.1f}")
        assert counters.failed == 0


async def _all_users(server) -> None:
    reader = server.served.answers.reader
    expected: dict[str, str] = {}

    def alone(messages) -> str:
        key = json.dumps(messages)
        if key not in expected:
            backend = LocalBackend(reader.model, reader.tokenizer, SamplingSettings(max_new_tokens=8))
            expected[key] = "".join(backend.stream(backend.prompt(messages)))
        return expected[key]

    crossings: list[str] = []
    talks = await asyncio.gather(*(_page_user(server.url, user, crossings) for user in range(40)))
    talks += await asyncio.gather(*(_api_user(server.url, user, crossings) for user in range(40, 50)))
    await _thief(server.url)
    assert crossings == []
    checked = 0
    for messages in talks[::7]:  # the answers themselves, word for word
        for turn in range(1, len(messages), 2):
            assert messages[turn]["content"] == alone(messages[:turn])
            checked += 1
    print(f"50 users, 1000 turns: {len(crossings)} crossings; {checked} answers equal to a run alone")


def _note(text: str, user: int, crossings: list[str]) -> None:
    crossings.extend(f"{user} saw {other}" for other in CANARY.findall(text) if int(other) != user)


async def _page_user(url: str, user: int, crossings: list[str]) -> list[dict]:
    """What gradio's page does: join the queue, read the stream of the session."""
    session, chat, shown, kept = f"session{user:04d}", [], [], ""
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        assert (await client.get("/")).status_code == 200
        for turn in range(20):
            data = [f"canary-{user}-{turn} Why?", shown, kept, [], None, False, "", 0, 1, 0, 1, 8, 42]
            body = {"data": data, "fn_index": 0, "session_hash": session, "trigger_id": 1}
            joined = await client.post("/gradio_api/queue/join", json=body)
            assert joined.status_code == 200, joined.text
            params = {"session_hash": session}
            async with client.stream("GET", "/gradio_api/queue/data", params=params) as reply:
                async for line in _lines(reply):
                    _note(line, user, crossings)
                    if '"process_completed"' in line:
                        output = json.loads(line.removeprefix("data:"))["output"]["data"]
                        shown, kept = output[1], output[5]
                        chat = json.loads(kept)["messages"]
                        break
            assert len(chat) == 2 * turn + 2, chat
    return chat


async def _lines(reply: httpx.Response) -> AsyncIterator[str]:
    """httpx's own lines end at more characters than those of an event stream."""
    left = b""
    async for chunk in reply.aiter_bytes():
        *whole, left = (left + chunk).split(b"\n")
        for line in whole:
            yield line.decode()


async def _api_user(url: str, user: int, crossings: list[str]) -> list[dict]:
    messages: list[dict] = []
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        for turn in range(20):
            messages.append({"role": "user", "content": f"canary-{user}-{turn} Why?"})
            body = {"model": "tiny", "messages": messages, "max_tokens": 8}
            reply = await client.post("/v1/chat/completions", json=body)
            _note(reply.text, user, crossings)
            messages.append(
                {"role": "assistant", "content": reply.json()["choices"][0]["message"]["content"]}
            )
    return messages


async def _thief(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        await client.get("/")
        for user in range(40):
            reply = await client.get("/gradio_api/queue/data", params={"session_hash": f"session{user:04d}"})
            assert reply.status_code == 403


def test_two_hundred_clients_at_once(process):
    url, server = process
    before = server.memory_info().rss
    statuses, health = asyncio.run(_storm(url))
    grown = (server.memory_info().rss - before) / 2**20
    health.sort()
    p99 = health[int(0.99 * len(health))]
    print(f"{dict(statuses)}, +{grown:.0f} MiB, health p99 {p99 * 1000:.0f} ms of {len(health)}")
    assert set(statuses) == {200, 503} and statuses[200] >= 40
    assert grown < 300 and p99 < 1


async def _storm(url: str) -> tuple[Counter, list[float]]:
    health: list[float] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=limits) as client:

        async def watch() -> None:
            while True:
                began = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                health.append(time.monotonic() - began)
                await asyncio.sleep(0.02)

        async def ask(number: int) -> int:
            body = {
                "messages": [{"role": "user", "content": f"{number} Why?"}],
                "model": "tiny",
                "max_tokens": 200,
            }
            reply = await client.post("/v1/chat/completions", json=body)
            if reply.status_code == 503:
                assert int(reply.headers["retry-after"]) > 0
            return reply.status_code

        watching = asyncio.create_task(watch())
        statuses = Counter(await asyncio.gather(*(ask(number) for number in range(200))))
        watching.cancel()
    return statuses, health


def test_five_hundred_slow_sockets(process):
    url, _ = process
    port = int(url.rpartition(":")[2])
    slowest, served = asyncio.run(_slow(port, url))
    print(f"500 slow sockets closed within {slowest:.1f} s; {served} honest answers meanwhile")
    assert slowest < 15 and served > 0


async def _slow(port: int, url: str) -> tuple[float, int]:
    began = time.monotonic()

    async def trickle(number: int) -> float:
        """A byte a second of a head, of a body, or nothing at all."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n"
        writer.write((b"", head, head + b"\r\n")[number % 3])
        gone = asyncio.create_task(reader.read(-1))
        while not gone.done():
            if number % 3:
                with contextlib.suppress(OSError):
                    writer.write(b"x")
                    await writer.drain()
            await asyncio.wait({gone}, timeout=1)
        with contextlib.suppress(OSError):
            gone.result()
        writer.close()
        return time.monotonic() - began

    async def honest() -> int:
        served = 0
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            while time.monotonic() - began < 8:
                body = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4}
                reply = await client.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200
                served += 1
        return served

    *times, served = await asyncio.gather(*(trickle(number) for number in range(500)), honest())
    return max(times), served


@pytest.mark.skipif(not shutil.which("schemathesis"), reason="needs schemathesis (pip install schemathesis)")
def test_nothing_that_is_sent_is_a_server_error(process):
    url, _ = process
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
            *(
                "--checks",
                "not_a_server_error",
                "--max-examples",
                "150",
                "--seed",
                "1",
                "--request-timeout",
                "60",
            ),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(done.stdout[-2500:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
