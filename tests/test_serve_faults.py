"""What goes wrong at a server's expense: it stays up, frees everything, and answers the others."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openai import OpenAI
from schemathesis.checks import not_a_server_error

from octavo import LLM
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.serve.app import create_app
from octavo.serve.settings import Settings
from tests.serving import CARD_MODEL, SUM, Server, ask, eventually
from tests.test_serve_errors import CHAT, error_of

LONG: Any = {"messages": SUM, "max_tokens": 5000, "ignore_eos": True}
RIGHT = "23 + 48 = 60 + 11 = 71."


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_pages(
    server: Server, client: OpenAI, streamed: bool
) -> None:
    assert eventually(server.is_idle)
    before = server.metric("octavo_generated_tokens_total")
    for _ in range(3):
        if streamed:
            with server.http.stream("POST", CHAT, json=LONG | {"stream": True, "n": 2}) as response:
                lines = response.iter_lines()
                assert response.status_code == 200 and next(lines).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                server.http.post(CHAT, json=LONG, timeout=0.5)
    assert eventually(server.is_idle, seconds=10)  # 5,000 tokens would take longer
    assert server.metric("octavo_generated_tokens_total") - before < 3 * 5000
    assert ask(client).choices[0].message.content == RIGHT


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_requests_at_once_are_all_answered(server: Server, count: int) -> None:
    body = {"model": CARD_MODEL, "messages": SUM, "temperature": 0, "max_tokens": 3}

    async def main() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300) as http:
            return await asyncio.gather(*(http.post(CHAT, json=body) for _ in range(count)))

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [200] * count
    contents = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert contents == {"23 +"}
    assert eventually(server.is_idle)


def test_no_request_that_fits_the_schema_or_does_not_breaks_the_server(server: Server) -> None:
    api = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    operations: list[Any] = [operation.ok() for operation in api.get_all_operations()]  # type: ignore[union-attr]
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=8, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and ("prompt" in case.body or "messages" in case.body):
                case.body["max_tokens"] = 2  # a long answer proves nothing more
            case.call_and_validate(checks=[not_a_server_error], base_url=server.url, timeout=60)

        check()
    assert eventually(server.is_idle)


class Faulty(Engine):
    """An engine whose steps wait for leave, and raise as told."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.may_step = threading.Event()
        self.may_step.set()
        self.failures: list[Exception | None] = []

    def step(self) -> list[RequestOutput]:
        self.may_step.wait(10)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return super().step()


def run(
    llm: LLM, test: Callable[[httpx.AsyncClient, Faulty], Awaitable[None]], **limits: Any
) -> None:
    """Run a test against an app in this process whose engine can be made to fail."""

    async def main() -> None:
        app = create_app(Settings(("m",), **limits))
        engine = Faulty(llm.model, llm.tokenizer, max_num_seqs=2)
        app.state.service.open(engine, llm.tokenizer)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://m") as http:
            try:
                await test(http, engine)
                metrics = (await http.get("/metrics")).text
                assert "octavo_answers_running 0.0" in metrics
                assert "octavo_pages_used 0.0" in metrics
            finally:
                engine.may_step.set()
                await app.state.service.drain()

    asyncio.run(main())


HELLO: Any = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}


async def content(http: httpx.AsyncClient) -> str:
    response = await http.post(CHAT, json=HELLO)
    assert response.status_code == 200
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_a_step_that_raises_is_a_500_and_the_server_goes_on(llm: LLM) -> None:
    async def test(http: httpx.AsyncClient, engine: Faulty) -> None:
        before = await content(http)
        engine.failures = [ValueError("a secret of the engine")]
        response = await http.post(CHAT, json=HELLO)
        assert response.status_code == 500
        error = error_of(response)
        assert error["code"] == "engine_error" and "secret" not in response.text
        assert await content(http) == before
        assert (await http.get("/health")).status_code == 200

    run(llm, test)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(llm: LLM) -> None:
    async def test(http: httpx.AsyncClient, engine: Faulty) -> None:
        engine.failures = [None, None, None, ValueError("x")]
        response = await http.post(CHAT, json=HELLO | {"stream": True})
        assert response.status_code == 200
        events = response.text.strip().split("\n\n")
        last = json.loads(events[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error" and "[DONE]" not in response.text
        assert len(events) >= 2  # the role's, at least

    run(llm, test)


def test_past_the_queue_a_request_is_told_when_to_come_again(llm: LLM) -> None:
    async def test(http: httpx.AsyncClient, engine: Faulty) -> None:
        engine.may_step.clear()
        asked = [asyncio.ensure_future(http.post(CHAT, json=HELLO)) for _ in range(4)]
        (refused,), running = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        response = refused.result()
        assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
        assert error_of(response)["code"] == "queue_full"
        engine.may_step.set()
        assert [(await each).status_code for each in running] == [200] * 3

    run(llm, test, max_queue=1)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_past_its_time_is_ended(llm: LLM, streamed: bool) -> None:
    async def test(http: httpx.AsyncClient, engine: Faulty) -> None:
        response = await http.post(
            CHAT, json=HELLO | {"max_tokens": 500, "ignore_eos": True, "stream": streamed}
        )
        if streamed:
            last = response.text.strip().split("\n\n")[-1]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert response.status_code == 200
        else:
            error = error_of(response)
            assert response.status_code == 504
        assert error["code"] == "timeout" and "0.3 s" in error["message"]
        for _ in range(100):
            if "octavo_answers_running 0.0" in (await http.get("/metrics")).text:
                break
            await asyncio.sleep(0.05)

    run(llm, test, request_timeout=0.3)


def test_a_bug_in_the_server_is_a_500_without_its_traceback(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(http: httpx.AsyncClient, engine: Faulty) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ValueError("a secret of the server")

        monkeypatch.setattr("octavo.serve.chat.chat_params", broken)
        response = await http.post(CHAT, json=HELLO)
        assert response.status_code == 500 and "secret" not in response.text
        assert error_of(response)["code"] == "internal_error"

    run(llm, test)
