"""Sixteen people at once: tokens a second and time to the first token, beside other servers on the same machine.

    python tests/benchmarks/serving_speed.py MODEL_FOLDER [--users 16] [--tokens 64] [--llama PYTHON GGUF] \
        [--only NAME]

Each server answers the same questions, greedily, one server after the other: `medgpt serve-demo`, `transformers serve`
with and without continuous batching, and llama.cpp's server from llama-cpp-python where an interpreter that
has it is named. Each gets one question to warm up. fp32 everywhere but in llama.cpp, which takes the GGUF as it is.
Every user asks `--turns` questions, one after the other. What was said is counted with the model's own tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

QUESTIONS = Path(__file__).parents[1] / "data" / "medquad_en_dev.jsonl"


class _Tokenizer:
    """Counts what was said with one tokenizer for all servers."""

    def read(self, folder: str) -> None:
        from transformers import AutoTokenizer

        self.encode = AutoTokenizer.from_pretrained(folder).encode


TOKENIZER = _Tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--llama", nargs=2, metavar=("PYTHON", "GGUF"))
    parser.add_argument("--only")
    chosen = parser.parse_args()
    TOKENIZER.read(chosen.model)
    questions = [json.loads(line)["question"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    for name, command, model in servers(chosen):
        if chosen.only in (None, name):
            report(name, measure(command, model, questions, chosen))


def servers(chosen: argparse.Namespace) -> list[tuple[str, list[str], str]]:
    model = str(Path(chosen.model).resolve())
    python = sys.executable
    transformers = [str(Path(python).with_name("transformers")), "serve", model, "--device", "cpu"]
    transformers += ["--dtype", "float32", "--host", "127.0.0.1", "--port", "PORT"]
    ours = [
        python,
        "-m",
        "medicalgpt_cli",
        "serve-demo",
        "--base-model",
        model,
        "--use-cpu",
        "--port",
        "PORT",
    ]
    found = [
        ("medgpt", [*ours, "--max-client-requests", "64"], Path(model).name),
        ("transformers", transformers, model),
        ("transformers-continuous", [*transformers, "--continuous-batching"], model),
    ]
    if chosen.llama:
        interpreter, gguf = chosen.llama
        llama = [interpreter, "-m", "llama_cpp.server", "--model", gguf, "--port", "PORT"]
        llama += ["--interrupt_requests", "false"]
        found.append(("llama.cpp", [*llama, "--n_ctx", "4096", "--chat_format", "chatml"], gguf))
    return found


def measure(command: list[str], model: str, questions: list[str], chosen: argparse.Namespace) -> dict:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with Path("serving_speed.log").open("w") as log:
        server = subprocess.Popen(
            [str(port) if part == "PORT" else part for part in command],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}/v1"
            wait_for(f"http://127.0.0.1:{port}", server)
            asyncio.run(users(url, model, questions[:1], 1, 1, 8))
            return asyncio.run(users(url, model, questions, chosen.users, chosen.turns, chosen.tokens))
        finally:
            server.terminate()
            server.wait(60)


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(1200):
        try:
            httpx.get(f"{url}/health", trust_env=False, timeout=5)
            return
        except httpx.HTTPError:
            if server.poll() is not None:
                raise SystemExit("the server ended: see serving_speed.log") from None
            time.sleep(0.25)
    raise SystemExit("the server did not start")


async def users(url: str, model: str, questions: list[str], count: int, turns: int, tokens: int) -> dict:
    async with httpx.AsyncClient(
        timeout=1800, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def one(user: int) -> list[tuple[float, str]]:
            return [
                await ask(client, url, model, questions[(user * turns + turn) % len(questions)], tokens)
                for turn in range(turns)
            ]

        began = time.monotonic()
        found = await asyncio.gather(*(one(user) for user in range(count)))
        seconds = time.monotonic() - began
    flat = [answer for user in found for answer in user]
    waits = sorted(wait for wait, _ in flat)
    total = sum(len(TOKENIZER.encode(said, add_special_tokens=False)) for _, said in flat)
    return {
        "tokens/s": total / seconds,
        "first token, median s": statistics.median(waits),
        "first token, longest s": waits[-1],
        "tokens": total,
        "seconds": seconds,
    }


async def ask(
    client: httpx.AsyncClient, url: str, model: str, question: str, tokens: int
) -> tuple[float, int]:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    body |= {"max_tokens": tokens, "temperature": 0.0}
    began, first, said = time.monotonic(), 0.0, ""
    async with client.stream("POST", f"{url}/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{reply.status_code}: {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data:") or "[DONE]" in line:
                continue
            event = json.loads(line.removeprefix("data:"))
            piece = "".join(
                (one.get("delta") or {}).get("content") or "" for one in event.get("choices") or []
            )
            if piece:
                first = first or time.monotonic() - began
                said += piece
    return first, said


def report(name: str, found: dict) -> None:
    print(f"{name:24}", "  ".join(f"{key}: {value:.2f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
