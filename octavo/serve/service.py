"""What the routes work with: the engine, its tokenizer, the settings, and the way in and out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from octavo.engine.async_engine import AsyncEngine
from octavo.engine.async_request import AsyncRequest
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.serve import responses
from octavo.serve.errors import ApiError, as_api_error, unavailable
from octavo.serve.metrics import Metrics
from octavo.serve.settings import Settings
from octavo.tokenizer import Tokenizer

Result = TypeVar("Result")


class Service:
    """One model behind the API. Requests get 503 until `open`, and after `drain`.

    Attributes:
        engine: None until the model is loaded.
        is_draining: from the first signal on.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.engine: AsyncEngine | None = None
        self.is_draining = False
        self.created = responses.now()
        self.max_model_len: int | None = None
        self._tokenizer: Tokenizer | None = None

    def open(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """Begin to answer. The engine is the service's from here on."""
        self._tokenizer = tokenizer
        self.max_model_len = engine.max_model_len
        self.engine = AsyncEngine(
            engine, max_waiting=self.settings.max_queue, timeout=self.settings.request_timeout
        )
        self.metrics.watch(self.engine)

    async def drain(self) -> None:
        """Refuse what is new, finish what is running within `drain_timeout`, and stop."""
        self.is_draining = True
        if self.engine is not None:
            await self.engine.drain(self.settings.drain_timeout)
            await self.engine.stop()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's.

        Raises:
            ApiError: 503 while it is being loaded.
        """
        if self._tokenizer is None:
            raise unavailable("the model is being loaded")
        return self._tokenizer

    def check_model(self, name: str | None) -> str:
        """The name that an answer carries.

        Raises:
            ApiError: 404, naming those that are served.
        """
        names = self.settings.model_names
        if name is None:
            return names[0]
        if name not in names:
            served = ", ".join(names)
            raise ApiError(
                404,
                f"model: {name!r} is not served here; {served} is",
                param="model",
                code="model_not_found",
            )
        return name

    def check_room(self) -> AsyncEngine:
        """The engine, if it takes requests now.

        Raises:
            ApiError: 503 while loading. QueueFull, Draining, EngineFailure: it does not.
        """
        if self.engine is None:
            raise unavailable("the model is being loaded")
        self.engine.check_room()
        return self.engine

    async def tokenize(self, encode: Callable[[], Result]) -> Result:
        """Run `encode` off the event loop."""
        if self.engine is None:
            raise unavailable("the model is being loaded")
        return await self.engine.tokenize(encode)

    async def submit(
        self, prompts: Sequence[list[int]], params: SamplingParams, field: str, streams: bool
    ) -> list[AsyncRequest]:
        """Queue prompts; return once the engine has accepted all of them.

        Raises:
            ApiError: a prompt longer than the context. RequestError, QueueFull, Draining,
                EngineFailure: none of them was taken.
        """
        engine = self.check_room()
        for prompt_ids in prompts:
            self._check_length(len(prompt_ids), params, field)
        requests: list[AsyncRequest] = []
        try:
            for prompt_ids in prompts:
                requests.append(engine.add_request(prompt_ids, params, streams=streams))
            for request in requests:
                await request.accepted()
        except BaseException:
            self.close(requests)
            raise
        return requests

    def close(self, requests: Sequence[AsyncRequest]) -> None:
        """Abort what is not finished, and count all of them."""
        for request in requests:
            request.abort()
            self.metrics.observe(request)

    def _check_length(self, n_tokens: int, params: SamplingParams, field: str) -> None:
        limit = self.max_model_len or 0
        if n_tokens + (params.max_tokens != 0) > limit:
            raise ApiError(
                400,
                f"{field}: {n_tokens} tokens, but the model's context is {limit} with the answer; "
                "shorten it",
                param=field,
                code="context_length_exceeded",
            )


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]


async def unless_gone(http: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client goes away.

    Raises:
        ApiError: 499, which nobody reads.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def merged(requests: Sequence[AsyncRequest]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs of several requests as they come, with the request's place in the list."""
    streams = [request.outputs() for request in requests]
    pending = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = pending.pop(task)
                output = task.result()
                if not output.finished:
                    pending[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, output
    finally:
        for task in pending:
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of JSON chunks, ended by [DONE] or by an error's event.

    Args:
        chunks: JSON texts.
        on_close: called once, however the stream ends, also if it never began.
    """

    def __init__(self, chunks: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        super().__init__(
            _events(chunks),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _events(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {chunk}\n\n"
    except Exception as error:
        yield f"data: {as_api_error(error).body.model_dump_json()}\n\n"
    else:
        yield "data: [DONE]\n\n"
