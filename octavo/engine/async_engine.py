"""The engine behind asyncio: one worker thread steps, requests and answers cross without blocking.

The loop never waits for a step and the worker never waits for the loop. A reader gets the newest
state of its answers and not every state: while it has not read one, the worker makes no other, so a
slow reader costs nothing and a long answer is not copied for each of its tokens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TypeVar

from octavo.engine.async_request import (
    AsyncRequest,
    Draining,
    EngineFailure,
    QueueFull,
    TimedOut,
)
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.stats import EngineStats
from octavo.errors import OctavoError, RequestError, is_out_of_memory

logger = logging.getLogger("octavo")
Result = TypeVar("Result")


class AsyncEngine:
    """Runs an `Engine` in a thread of its own. Made, and used, on one event loop.

    Args:
        engine: nobody else may touch it from now on.
        max_waiting: answers beyond `max_num_seqs` that may be in the house at once.
        timeout: seconds that a request may take, its wait included; None is any time.

    Attributes:
        stats: the engine's, after the latest step.
        error: what ended the worker for good, or None: Draining after `stop`, else an
            EngineFailure. Such an engine must be made anew.
    """

    def __init__(
        self, engine: Engine, *, max_waiting: int = 1024, timeout: float | None = None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.stats: EngineStats = engine.stats()
        self.error: EngineFailure | Draining | None = None
        self._engine = engine
        self._capacity = engine.max_num_seqs + max_waiting
        self._timeout = timeout
        self._n_answers = 0  # admitted and not finished; the loop's
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        # (request, True) comes in, (request, False) is aborted, None ends the worker.
        self._inbox: SimpleQueue[tuple[AsyncRequest, bool] | None] = SimpleQueue()
        # The worker's: requests by engine id, in order of arrival, those without a token apart.
        self._live: dict[int, AsyncRequest] = {}
        self._unbegun: dict[int, AsyncRequest] = {}
        self._tokenizers = ThreadPoolExecutor(2, thread_name_prefix="octavo-tokenizer")
        self._worker = threading.Thread(target=self._work, name="octavo-engine", daemon=True)
        self._worker.start()

    # On the loop.

    async def tokenize(self, encode: Callable[[], Result]) -> Result:
        """Run `encode` off the loop: 100,000 tokens take a moment."""
        return await self.loop.run_in_executor(self._tokenizers, encode)

    def check_room(self) -> None:
        """Raise if a request that comes now would not be taken.

        Raises:
            QueueFull, Draining, EngineFailure
        """
        self._check_open()
        if self._n_answers >= self._capacity:
            raise QueueFull(f"{self._n_answers} answers are running or waiting; try again later")

    def add_request(
        self, prompt_ids: list[int], params: SamplingParams, *, streams: bool = False
    ) -> AsyncRequest:
        """Send a request to the engine. It lives until it is finished or aborted.

        Room is asked for apart, so that several that belong together are taken together.

        Raises:
            Draining, EngineFailure: it was not sent.
        """
        self._check_open()
        request = AsyncRequest(self, prompt_ids, params, streams)
        self._n_answers += params.n
        self._idle.clear()
        self._inbox.put((request, True))
        if self._timeout is not None:
            request.timer = self.loop.call_later(self._timeout, self._expire, request)
        return request

    def abort(self, request: AsyncRequest) -> None:
        """See `AsyncRequest.abort`; a request that is finished stays so."""
        if request.finished is None:
            self._inbox.put((request, False))
            self._leave(request)

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that are here; whether all were answered.

        Args:
            timeout: seconds; what is left then, `stop` ends.
        """
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the worker after its step; live requests end in Draining."""
        self._draining = True
        self._inbox.put(None)
        await asyncio.to_thread(self._worker.join)
        self._tokenizers.shutdown(wait=False, cancel_futures=True)

    def check_running(self) -> None:
        """Raise `error` if the worker has ended."""
        if self.error is not None:
            raise copy(self.error)  # each raise adds to a traceback, which keeps what was asked

    def _check_open(self) -> None:
        self.check_running()
        if self._draining:
            raise Draining("the server is shutting down")

    def _expire(self, request: AsyncRequest) -> None:
        self.abort(request)
        request.on_error(TimedOut(f"the answer was not finished after {self._timeout:g} s"))

    def _leave(self, request: AsyncRequest) -> None:
        """Count a request out, once."""
        if request.finished is None:
            request.finished = time.monotonic()
            if request.timer is not None:
                request.timer.cancel()
            self._n_answers -= request.params.n
            if self._n_answers == 0:
                self._idle.set()

    def _deliver(
        self,
        outputs: Sequence[tuple[AsyncRequest, RequestOutput]],
        begun: Sequence[tuple[AsyncRequest, float]] = (),
        failed: Sequence[tuple[AsyncRequest, OctavoError]] = (),
    ) -> None:
        for request, when in begun:
            request.first_token = when
        for request, output in outputs:
            if output.finished and request.finished is None:
                request.n_tokens = max(len(answer.token_ids) for answer in output.outputs)
                self._leave(request)
            request.on_output(output)
        for request, error in failed:
            self._leave(request)
            request.on_error(error)

    def _close(self, requests: list[AsyncRequest], error: OctavoError) -> None:
        """The worker has ended; on the loop, so that nothing comes in meanwhile."""
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None:
                requests.append(message[0])
        self._deliver([], [], [(request, error) for request in requests])

    # In the worker.

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        self.stats = self._engine.stats()  # who reads an answer finds it counted
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)

    def _work(self) -> None:
        try:
            while self._take_in():
                if self._engine.has_work:
                    self._step()
                self.stats = self._engine.stats()
            self.error = Draining("the server shut down before the answer was finished")
        except Exception:  # recovering failed too: nothing here can be trusted any more
            logger.exception("octavo: the engine stopped")
            self.error = EngineFailure("the engine has stopped; the server must be started again")
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._close, list(self._live.values()), self.error)

    def _take_in(self) -> bool:
        """Everything that has come in, waiting for it if there is nothing to do; False to end."""
        try:
            message = self._inbox.get(block=not self._engine.has_work)
            while message is not None:
                request, comes = message
                if comes:
                    self._add(request)
                elif request.request_id in self._live:  # and has not finished meanwhile
                    self._engine.abort(request.request_id)
                    self._forget(request.request_id)
                message = self._inbox.get(block=False)
        except Empty:
            return True
        return False

    def _add(self, request: AsyncRequest) -> None:
        try:
            request_id = self._engine.add_request(request.prompt_ids, request.params)
        except RequestError as error:
            self._post(self._deliver, [], [], [(request, error)])
            return
        except Exception as error:
            logger.exception("octavo: a request could not be queued")
            self._post(self._deliver, [], [], [(request, _failure(error))])
            return
        request.request_id = request_id
        self._live[request_id] = self._unbegun[request_id] = request
        self._post(request.on_accepted)

    def _forget(self, request_id: int) -> None:
        self._live.pop(request_id, None)
        self._unbegun.pop(request_id, None)

    def _step(self) -> None:
        try:
            finished = self._engine.step()
        except Exception as error:
            logger.exception("octavo: a step failed; the requests in it are lost")
            self._recover(_failure(error))
            return
        now = time.monotonic()
        outputs = []
        begun = []
        for output in finished:
            request = self._live[output.request_id]
            if output.request_id in self._unbegun:
                begun.append((request, now))
            self._forget(output.request_id)
            outputs.append((request, output))
        # First come, first served: of those without a token, only the first can have got one.
        for request_id, request in list(islice(self._unbegun.items(), self._engine.max_num_seqs)):
            if any(answer.token_ids for answer in self._engine.output(request_id).outputs):
                del self._unbegun[request_id]
                begun.append((request, now))
        for request_id, request in self._live.items():
            if request.streams and not request.unread and request_id not in self._unbegun:
                request.unread = True
                outputs.append((request, self._engine.output(request_id)))
        if outputs or begun:
            self._post(self._deliver, outputs, begun)

    def _recover(self, failure: EngineFailure) -> None:
        """Leave the engine as if new: fail what may have been in the step, queue the rest again.

        A step that raised may have stored keys and values of some layers and not of others, so
        nothing that was running can go on. What has not begun has nothing to lose.
        """
        waiting = list(islice(self._unbegun.values(), self._engine.max_num_seqs, None))
        running = [r for r in self._live.values() if r not in set(waiting)]
        for request_id in self._live:
            self._engine.abort(request_id)
        stats = self._engine.stats()
        if stats.running or stats.waiting or stats.pages_used:
            raise EngineFailure(f"pages or answers are left behind: {stats}") from failure
        self._live.clear()
        self._unbegun.clear()
        self._fail(running, failure)
        for request in waiting:
            self._add(request)

    def _fail(self, requests: list[AsyncRequest], failure: EngineFailure) -> None:
        self._post(self._deliver, [], [], [(request, failure) for request in requests])


def _failure(error: Exception) -> EngineFailure:
    """What a client is told of an error in the engine; the log has the rest."""
    if isinstance(error, OctavoError):
        return EngineFailure(str(error))
    if is_out_of_memory(error):
        return EngineFailure("the server ran out of memory; try a shorter prompt, or later")
    return EngineFailure("the server failed while it computed this answer; its log says why")
