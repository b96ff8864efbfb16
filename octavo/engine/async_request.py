"""One request to an `AsyncEngine`, as its reader sees it, and the ways in which it can fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from copy import copy
from typing import TYPE_CHECKING

from octavo.engine.outputs import RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine


class EngineFailure(OctavoError):
    """A step raised: the request cannot be answered, through no fault of its own."""


class QueueFull(OctavoError):
    """As many answers are running and waiting as are allowed to."""


class Draining(OctavoError):
    """The engine takes no more requests."""


class TimedOut(OctavoError):
    """The request took longer than it may."""


class Aborted(OctavoError):
    """The request was aborted while its answer was waited for."""


class AsyncRequest:
    """One request, as its reader sees it. Belongs to the event loop.

    Attributes:
        arrived, first_token, finished: `time.monotonic()` seconds; None until then. An aborted
            request is finished too.
        n_tokens: of the longest answer, once all are finished; None until then.
    """

    def __init__(
        self, engine: AsyncEngine, prompt_ids: list[int], params: SamplingParams, streams: bool
    ) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.streams = streams
        self.arrived = time.monotonic()
        self.first_token: float | None = None
        self.finished: float | None = None
        self.n_tokens: int | None = None
        # The worker's: the id within the engine, and whether the reader has yet to read.
        self.request_id: int | None = None
        self.unread = False
        self._engine = engine
        self.timer: asyncio.TimerHandle | None = None
        self._accepted: asyncio.Future[None] = engine.loop.create_future()
        self._changed = asyncio.Event()
        self._newest: RequestOutput | None = None
        self._error: OctavoError | None = None

    async def accepted(self) -> None:
        """Return once the engine has checked and queued the request.

        Raises:
            RequestError: it cannot be served.
        """
        await self._accepted

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """The answers as far as they are, whenever they have grown; the last one is finished.

        A request that does not stream yields the finished one only.

        Raises:
            EngineFailure: the engine lost the request.
            Aborted, Draining, TimedOut: it ended before it was finished.
        """
        while True:
            await self._changed.wait()
            if self._error is not None:
                raise self._error
            self._changed.clear()
            output, self._newest = self._newest, None
            self.unread = False
            if output is not None:
                yield output
                if output.finished:
                    return

    async def result(self) -> RequestOutput:
        """The finished answers.

        Raises:
            As `outputs`.
        """
        async for output in self.outputs():  # noqa: B007
            pass
        return output

    def abort(self) -> None:
        """Forget the request, whatever its state; its pages are free before the next step.

        Who still waits for its answer is told that it was Aborted.
        """
        if self.finished is None:
            self._engine.abort(self)
            self.on_error(Aborted("the request was aborted before its answer was finished"))

    # Called on the loop by the worker.

    def on_accepted(self) -> None:
        if not self._accepted.done():  # it is where the reader left, or where it is queued again
            self._accepted.set_result(None)

    def on_output(self, output: RequestOutput) -> None:
        self._newest = output
        self._changed.set()

    def on_error(self, error: OctavoError) -> None:
        error = copy(error)  # others may be told the same, and each raise adds to a traceback
        if not self._accepted.done():
            self._accepted.set_exception(error)
            self._accepted.exception()  # it may be that nobody waits for this, and only reads
        self._error = error
        self._changed.set()
