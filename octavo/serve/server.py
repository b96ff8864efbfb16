"""One server process: a port, a model loaded behind it, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from octavo.engine.llm import LLM
from octavo.errors import ConfigError
from octavo.serve.app import create_app
from octavo.serve.service import Service
from octavo.serve.settings import Settings

EXIT_AT_ONCE = 130  # a second signal, as shells count SIGINT
FLUSH_SECONDS = 10  # for slow readers to take what was written for them, once all is answered


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        ConfigError: the host is not this machine's, or the port taken or forbidden.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        code = getattr(error, "errno", None)
        if code == errno.EADDRNOTAVAIL or isinstance(error, (socket.gaierror, UnicodeError)):
            raise ConfigError(
                f"--host: {host!r} is not an address or name of this machine; 0.0.0.0 stands for "
                "all that it has"
            ) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--port: cannot listen on {host}:{port}: {reason}; choose another, or 0 for a free one"
        ) from None


def serve(
    settings: Settings,
    listener: socket.socket,
    load: Callable[[], LLM],
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT; running answers are finished first.

    Args:
        settings: names, keys and limits.
        listener: from `listen`.
        load: makes the model; meanwhile the server says that it is not ready.
        on_ready: called when it is.

    Raises:
        OctavoError: the model cannot be loaded.
    """
    asyncio.run(_serve(settings, listener, load, on_ready))


async def _serve(
    settings: Settings,
    listener: socket.socket,
    load: Callable[[], LLM],
    on_ready: Callable[[], None],
) -> None:
    app = create_app(settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )  # fmt: skip
    server = _Server(config, service)
    serving = asyncio.ensure_future(server.serve([listener]))
    await asyncio.sleep(0)  # it has its signal handlers before the model is loaded
    loading = _in_daemon_thread(load)
    both: list[asyncio.Future[Any]] = [serving, loading]
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and not service.is_draining:
        try:
            llm = loading.result()
            service.open(llm.engine, llm.tokenizer)
            on_ready()
        except BaseException:
            server.should_exit = True
            await serving
            raise
    await serving
    if not loading.done():
        sys.stdout.flush()
        os._exit(0)  # torch aborts a process that ends by itself while a thread loads a model


def _in_daemon_thread(load: Callable[[], LLM]) -> asyncio.Future[LLM]:
    """`load` in a thread that does not keep a process alive which is told to end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[LLM] = loop.create_future()

    def run() -> None:
        try:
            result = load()
        except BaseException as error:
            loop.call_soon_threadsafe(future.set_exception, error)
        else:
            loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=run, name="octavo-load", daemon=True).start()
    return future


class _Server(uvicorn.Server):
    """uvicorn, but a signal drains before it closes the port, so that new requests get a 503."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.is_draining:
            os._exit(EXIT_AT_ONCE)
        self._service.is_draining = True
        self._loop.call_soon_threadsafe(self._start_to_drain)

    def _start_to_drain(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True
