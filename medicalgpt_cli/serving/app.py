"""`medgpt serve-demo`: the model, the page and the API in one process, behind one guard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import signals
from medicalgpt_cli.errors import EnvironmentFailure, Stopped
from medicalgpt_cli.serving.access import Access, read_users
from medicalgpt_cli.serving.answers import Answers
from medicalgpt_cli.serving.api import add_api
from medicalgpt_cli.serving.guard import Guard
from medicalgpt_cli.settings.stages import ServeSettings

_STOP_SECONDS = 3  # for connections that are still open when the server stops


@dataclass(frozen=True)
class Served:
    """The model behind the server, and what a page says about it."""

    answers: Answers
    title: str
    about: str  # base, adapter, number format
    starter: bool = False  # the small model that comes with medgpt
    remote: bool = False  # whether it is another server's


def serve(settings: ServeSettings, observer: Observer) -> None:
    """Load the model and serve until a signal comes.

    Raises:
        EnvironmentFailure: the address or port cannot be used.
    """
    listener = bind(settings.host, settings.port)  # first: a busy port is no reason to load a model
    try:
        users = read_users(settings.auth_file) if settings.auth_file else None
        if settings.no_auth and not settings.local:
            observer.on_warning(
                f"--no-auth: everybody who reaches {settings.host}:{settings.port} can use the model"
            )
        served = open_model(settings, observer)
        try:
            app = build_app(settings, served, Access(users))
            server = make_server(app, settings, lambda: observer.on_notice(_where(settings)))
            asyncio.run(server.serve(sockets=[listener]))
        except KeyboardInterrupt as stopped:
            name = getattr(stopped, "signal_name", "SIGINT")
            raise Stopped(f"stopped by {name}", exit_code=getattr(stopped, "exit_code", 130)) from None
        finally:
            served.answers.close()
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not listen yet.

    Raises:
        EnvironmentFailure: it is taken, or not this machine's.
    """
    host = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except socket.gaierror:
        raise EnvironmentFailure(f"--host {host}: no such address", "127.0.0.1 is this machine") from None
    except OSError as problem:
        raise EnvironmentFailure(
            f"port {port} on {host} cannot be used ({problem.strerror})",
            f"another one: --port {port + 1 if port < 65535 else 7860}",
        ) from None
    return listener


def open_model(settings: ServeSettings, observer: Observer) -> Served:
    """The model as `medgpt chat` loads it. A model with an adapter also answers without it, under its base's name.

    With `--endpoint` it is another server's.
    """
    from medicalgpt_cli.engine.data.rendering import check_template
    from medicalgpt_cli.engine.generation.endpoint import EndpointBackend
    from medicalgpt_cli.engine.generation.endpoint_scheduler import EndpointScheduler
    from medicalgpt_cli.engine.generation.local import LocalBackend, load_to_answer
    from medicalgpt_cli.engine.generation.scheduler import Limits, Scheduler
    from medicalgpt_cli.engine.model.loading import load_tokenizer
    from medicalgpt_cli.engine.model.references import resolve_models

    limits = Limits(
        batch=settings.max_batch,
        batch_tokens=settings.max_batch_tokens,
        queue=settings.max_queue,
        client=settings.max_client_requests,
        seconds=settings.max_seconds,
    )
    if settings.endpoint:
        remote = EndpointBackend.open(settings, observer)
        answers = Answers(EndpointScheduler(remote, limits), remote, settings, {remote.model: "remote"})
        return Served(answers, remote.model, f"at {remote.url}", remote=True)
    resolved = resolve_models(settings)
    tokenizer = load_tokenizer(settings, resolved, observer)
    check_template(tokenizer, settings.thinking)
    model = load_to_answer(settings, resolved, observer)
    variants: dict[str, Any] = {"tuned": contextlib.nullcontext}
    models = {resolved.label: "tuned"}
    about = settings.quantization or str(model.dtype).removeprefix("torch.")
    if resolved.adapter is not None:
        base = Path(resolved.base.name).name
        variants["base"] = model.disable_adapter
        models[base if base != resolved.label else f"{base}-base"] = "base"
        about = f"LoRA adapter over {base}, {about}"
    backend = LocalBackend(model, tokenizer, settings, observer)
    answers = Answers(Scheduler(backend, limits, variants), backend.for_another_thread(), settings, models)
    return Served(answers, resolved.label, about, resolved.is_starter)


def build_app(settings: ServeSettings, served: Served, access: Access, *, page: bool = True) -> Guard:
    """The API and the page behind the guard."""
    app = FastAPI(title="medgpt", docs_url=None, redoc_url=None)
    add_api(app, served.answers)
    if page:
        from medicalgpt_cli.serving.page import add_page

        add_page(app, settings, served)
    hosts = ["localhost", "127.0.0.1", "[::1]", *settings.allowed_host]
    if not settings.local:
        hosts += [settings.host, socket.gethostname()]
    return Guard(
        app,
        access,
        hosts=hosts,
        any_address=not settings.local,
        port=settings.port,
        on_page_closed=served.answers.page_closed,
    )


def make_server(app: Guard, settings: ServeSettings, on_ready: Callable[[], None]) -> Any:
    """A uvicorn server with our connections, without logs of requests."""
    import uvicorn

    from medicalgpt_cli.serving.sockets import PatientProtocol

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn's own ends at SIGINT and SIGTERM; SIGHUP and SIGUSR1 mean the same here."""
            with super().capture_signals():
                if threading.current_thread() is not threading.main_thread():
                    yield
                    return
                with signals.handled(self.handle_exit):
                    yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                on_ready()

    for name in ("uvicorn.error", "asyncio"):  # their messages can quote what was being worked on
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=settings.behind_proxy,
        forwarded_allow_ips="127.0.0.1,::1" if settings.behind_proxy else None,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    return Server(config)


def _where(settings: ServeSettings) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    host = f"[{host}]" if ":" in host.strip("[]") else host
    return f"http://{host}:{settings.port}  (API: /v1; Ctrl-C stops)"
