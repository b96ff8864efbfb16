"""The door: which hosts, keys and sizes come in, before a byte of the body is read."""

from __future__ import annotations

import hmac
import re

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.serve import page
from octavo.serve.errors import ApiError
from octavo.serve.metrics import Metrics
from octavo.serve.settings import Settings

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")  # a name or address, and a port
# Probes, and pages that a browser opens before it can send a key.
OPEN_PATHS = ("/health", "/ready", "/docs", "/openapi.json", *page.PATHS)


class Guard:
    """Checks host, key and size of every request, and counts its response.

    Args:
        app: what is behind the door.
        settings: who may come in.
        metrics: where responses are counted.
        paths: the known ones; a response to any other is counted as one of `other`.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._paths = paths
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.count_response(path, message["status"])
            await send(message)

        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            self._check_host(headers.get(b"host", b""))
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            self._check_size(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        await self._app(scope, self._limited(receive), counted)

    def _check_host(self, header: bytes) -> None:
        allowed = self._settings.allowed_hosts
        if allowed is None:
            return
        host = header.decode("latin-1").lower()
        match = _HOST.fullmatch(host)
        if match is None or match[1] not in allowed:
            raise ApiError(
                403,
                f"the Host header names {host!r}; without --api-key this server answers only "
                f"{', '.join(allowed)}",
                code="host_not_allowed",
            )

    def _check_key(self, path: str, header: bytes) -> None:
        if not self._keys or path in OPEN_PATHS:
            return
        scheme, _, given = header.partition(b" ")
        given = given.strip()
        # Every key is compared, each in constant time, so that the time taken tells nothing.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            problem = "wrong" if given else "missing"
            raise ApiError(
                401,
                f"the API key is {problem}; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_size(self, header: bytes) -> None:
        if header.isdigit() and int(header[:20]) > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that stops a body which is longer than it said, or said nothing."""
        n_bytes = 0

        async def limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._settings.max_body_bytes:
                # FastAPI lets nothing else through from where it reads the body.
                raise HTTPException(413, str(_too_large(self._settings.max_body_bytes)))
            return message

        return limited


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than the {limit} bytes that this server takes",
        code="body_too_large",
        headers={"Connection": "close"},
    )
