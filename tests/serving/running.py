"""The real server on a real port, in a thread of the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.serving.access import Access
from medicalgpt_cli.serving.app import Served, bind, build_app, make_server, open_model
from medicalgpt_cli.settings.stages import ServeSettings


@dataclass
class Running:
    url: str
    served: Served
    access: Access
    settings: ServeSettings

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    @property
    def scheduler(self) -> Any:
        return self.served.answers.scheduler


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def running(
    model: Path | None, *, users: dict[str, str] | None = None, page: bool = False, **settings: Any
) -> Iterator[Running]:
    chosen = ServeSettings(
        **{
            "base_model": str(model) if model else None,
            "port": free_port(),
            "use_cpu": True,
            "dtype": "fp32",
            **settings,
        }
    )
    listener = bind(chosen.host, chosen.port)
    served = open_model(chosen, Observer())
    access = Access(users)
    ready = threading.Event()
    server = make_server(build_app(chosen, served, access, page=page), chosen, ready.set)
    thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listener]),), daemon=True)
    thread.start()
    try:
        assert ready.wait(60)
        yield Running(f"http://127.0.0.1:{chosen.port}", served, access, chosen)
    finally:
        server.should_exit = True
        thread.join(30)
        served.answers.close()
        listener.close()
