"""The door: keys, hosts, origins and sizes. No model is loaded for any of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest

from octavo.serve.app import create_app
from octavo.serve.settings import Settings
from tests.test_serve_errors import CHAT, error_of

LOADING = 503  # what a request gets that comes through the door


def ask(settings: Settings, method: str = "GET", path: str = "/v1/models", **fields: Any) -> Any:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **fields)

    return asyncio.run(send())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": key}


KEYS = Settings(("m",), api_keys=("one", "two"))


@pytest.mark.parametrize("header", ["Bearer one", "Bearer two", "bearer  two"])
def test_any_of_the_keys_opens(header: str) -> None:
    assert ask(KEYS, headers=bearer(header)).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer é"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/tokenize", CHAT, "/nope"])
def test_anything_else_does_not(header: str, path: str) -> None:
    response = ask(KEYS, path=path, headers=[("Authorization", header.encode())])
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"
    assert "one" not in response.text and "two" not in response.text


def test_a_missing_key_is_told_from_a_wrong_one() -> None:
    assert "missing" in error_of(ask(KEYS))["message"]
    assert "wrong" in error_of(ask(KEYS, headers=bearer("Bearer x")))["message"]


@pytest.mark.parametrize("path", ["/health", "/docs", "/openapi.json"])
def test_probes_and_documentation_need_no_key(path: str) -> None:
    assert ask(KEYS, path=path).status_code == 200


LOCAL = Settings(("m",), allowed_hosts=("localhost", "127.0.0.1", "[::1]"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("LOCALHOST", 200),
        ("attacker.example", 403), ("localhost.attacker.example:8000", 403), ("", 403),
        ("127.0.0.1.attacker.example", 403), ("[::1].attacker.example", 403),
    ],
)  # fmt: skip
def test_without_a_key_only_this_machines_names_are_answered(host: str, status: int) -> None:
    response = ask(LOCAL, headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert error_of(response)["code"] == "host_not_allowed"


ORIGIN = {"Origin": "https://page.example"}


def test_origins_are_allowed_only_if_asked() -> None:
    assert "access-control-allow-origin" not in ask(KEYS, headers=ORIGIN).headers
    settings = Settings(("m",), api_keys=("one",), allowed_origins=("https://page.example",))
    asked = ORIGIN | {"Access-Control-Request-Method": "POST",
                      "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    leave = ask(settings, "OPTIONS", CHAT, headers=asked)  # a browser sends no key with it
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://page.example"
    refused = ask(settings, headers=ORIGIN)  # and must be able to read why
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_past_the_limit_is_not_read(chunked: bool) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1000
            yield b" " * 1000

    body: Any = pieces() if chunked else b" " * 100_000
    headers = {"Content-Type": "application/json"}
    settings = Settings(("m",), max_body_bytes=10_000)
    response = ask(settings, "POST", CHAT, content=body, headers=headers)
    error = error_of(response)
    assert response.status_code == 413 and error["code"] == "body_too_large"
    assert "10000" in error["message"]
    assert sent <= 12_000


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize"])
def test_a_model_that_is_being_loaded_answers_503(path: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    response = ask(Settings(("m",)), "POST", path, json={"prompt": "x"} if path != CHAT else body)
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert "being loaded" in error_of(response)["message"]
    assert ask(Settings(("m",)), path="/ready").status_code == 503
    assert ask(Settings(("m",)), path="/health").status_code == 200
