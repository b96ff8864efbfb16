"""The worker thread: what readers get, what aborting frees, and what a failing step costs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.engine.async_engine import AsyncEngine
from octavo.engine.async_request import (
    Aborted,
    AsyncRequest,
    Draining,
    EngineFailure,
    QueueFull,
    TimedOut,
)
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.errors import RequestError

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


class Held(Engine):
    """An engine whose steps wait for leave, and fail when told to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.may_step = threading.Event()
        self.may_step.set()
        self.failures: list[Exception | None] = []  # of the next steps
        self.n_outputs = 0
        self.n_steps = 0

    def step(self) -> list[RequestOutput]:
        self.n_steps += 1
        self.may_step.wait(10)
        finished = super().step()
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return finished

    def output(self, request_id: int) -> RequestOutput:
        self.n_outputs += 1
        return super().output(request_id)


def prompt(llm: LLM, text: str = "Hello") -> list[int]:
    return llm.tokenizer.encode(text)


def run(
    llm: LLM, test: Callable[[AsyncEngine, Held], Awaitable[None]], max_num_seqs: int = 4,
    **options: Any,
) -> None:  # fmt: skip
    """Run a test with an engine that must be idle, all pages free, when it is over."""

    async def main() -> None:
        held = Held(llm.model, llm.tokenizer, max_num_seqs=max_num_seqs)
        engine = AsyncEngine(held, **options)
        try:
            await test(engine, held)
            await idle(engine)
        finally:
            held.may_step.set()
            await engine.stop()

    asyncio.run(main())


async def idle(engine: AsyncEngine) -> None:
    deadline = time.monotonic() + 10
    while engine.stats.running or engine.stats.waiting or engine.stats.pages_used:
        assert time.monotonic() < deadline, engine.stats
        await asyncio.sleep(0.01)


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_answers_are_the_engines_own(llm: LLM) -> None:
    texts = ["Hello", "a", "The sun"]
    expected = [o.outputs[0].token_ids for o in llm.generate(texts, PARAMS)]

    async def test(engine: AsyncEngine, _: Held) -> None:
        requests = [engine.add_request(prompt(llm, t), PARAMS, streams=False) for t in texts]
        assert [tokens(await request.result()) for request in requests] == expected
        for request in requests:
            assert request.first_token is not None and request.finished is not None
            assert request.arrived < request.first_token <= request.finished
            assert request.n_tokens == 12

    run(llm, test)


def test_a_reader_sees_its_answer_grow(llm: LLM) -> None:
    async def test(engine: AsyncEngine, _: Held) -> None:
        request = engine.add_request(prompt(llm), PARAMS, streams=True)
        seen = [tokens(output) async for output in request.outputs()]
        assert len(seen) > 1
        for before, after in pairwise(seen):
            assert after[: len(before)] == before
        assert len(seen[-1]) == 12

    run(llm, test)


def test_a_slow_reader_gets_the_newest_and_costs_nothing(llm: LLM) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        request = engine.add_request(prompt(llm), LONG, streams=True)
        quick = engine.add_request(prompt(llm), LONG, streams=False)
        lengths = []
        async for output in request.outputs():
            lengths.append(len(tokens(output)))
            if len(lengths) == 1:
                held.n_outputs = 0
                await quick.result()
                assert held.n_outputs <= 2  # not one a token, which would be 400
        assert lengths[-1] == 400 and len(lengths) <= 4

    run(llm, test)


def test_a_refused_request_is_not_accepted(llm: LLM) -> None:
    async def test(engine: AsyncEngine, _: Held) -> None:
        with pytest.raises(RequestError, match="vocabulary"):
            await engine.add_request([99_999], PARAMS).accepted()
        request = engine.add_request(prompt(llm), PARAMS)
        await request.accepted()
        assert len(tokens(await request.result())) == 12

    run(llm, test)


def test_aborting_frees_before_the_next_step(llm: LLM) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        request = engine.add_request(prompt(llm), LONG, streams=True)
        async for _ in request.outputs():
            break
        n_steps = held.n_steps
        request.abort()
        await idle(engine)
        assert n_steps < 100 and held.n_steps <= n_steps + 1

    run(llm, test)


@pytest.mark.parametrize("reads_first", [True, False])
def test_who_waits_for_an_aborted_answer_is_told(llm: LLM, reads_first: bool) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        held.may_step.clear()
        request = engine.add_request(prompt(llm), LONG)
        reading: asyncio.Task[Any] = asyncio.ensure_future(request.result())
        if reads_first:
            await request.accepted()
        request.abort()
        request.abort()  # a second time is no error
        held.may_step.set()
        for waiting in (reading, request.result()):
            with pytest.raises(Aborted, match="aborted before its answer was finished"):
                await asyncio.wait_for(waiting, 5)

    run(llm, test)


def test_past_the_queue_requests_are_refused(llm: LLM) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        held.may_step.clear()
        requests = [engine.add_request(prompt(llm), PARAMS) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 answers"):
            engine.check_room()
        requests[1].abort()
        engine.check_room()
        requests.append(engine.add_request(prompt(llm), PARAMS))
        held.may_step.set()
        for request in (requests[0], *requests[2:]):
            await request.result()

    run(llm, test, max_num_seqs=1, max_waiting=2)


def test_a_request_past_its_time_ends(llm: LLM) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        held.may_step.clear()
        request = engine.add_request(prompt(llm), PARAMS)
        with pytest.raises(TimedOut, match=r"after 0\.05 s"):
            await request.result()
        held.may_step.set()

    run(llm, test, timeout=0.05)


def test_a_failing_step_costs_only_what_was_in_it(llm: LLM) -> None:
    texts = ["Hello", "a", "The sun", "b", "c"]
    expected = [tokens(o) for o in llm.generate(texts, PARAMS)]

    async def test(engine: AsyncEngine, held: Held) -> None:
        held.may_step.clear()
        begun = engine.add_request(prompt(llm), LONG)
        while not held.n_steps:
            await asyncio.sleep(0.01)
        requests = [engine.add_request(prompt(llm, t), PARAMS, streams=True) for t in texts]
        held.failures = [None, ValueError("a bug")]
        held.may_step.set()
        for request in (begun, *requests[:2]):  # as many as max_num_seqs can have been in it
            with pytest.raises(EngineFailure, match="its log says why"):
                await request.result()
        assert [tokens(await request.result()) for request in requests[2:]] == expected[2:]
        again = engine.add_request(prompt(llm), PARAMS)
        assert tokens(await again.result()) == expected[0]

    run(llm, test, max_num_seqs=2)


@pytest.mark.parametrize(
    ("error", "says"),
    [(RuntimeError("out of memory, tried 5"), "ran out of memory"), (RequestError("it"), "it")],
)
def test_a_failure_says_what_a_client_may_know(llm: LLM, error: Exception, says: str) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        held.failures.append(error)
        with pytest.raises(EngineFailure, match=says):
            await engine.add_request(prompt(llm), PARAMS).result()

    run(llm, test)


def test_an_engine_that_cannot_recover_says_so_to_everybody(llm: LLM) -> None:
    async def main() -> None:
        held = Held(llm.model, llm.tokenizer, max_num_seqs=2)
        engine = AsyncEngine(held)
        held.abort = lambda request_id: None  # type: ignore[method-assign]
        held.failures.append(ValueError("a bug"))
        held.may_step.clear()  # a worker that has ended takes no more requests
        requests = [engine.add_request(prompt(llm), PARAMS) for _ in range(4)]
        held.may_step.set()
        for request in requests:
            with pytest.raises(EngineFailure, match="started again"):
                await request.result()
        depths = set()
        for _ in range(3):
            with pytest.raises(EngineFailure, match="started again") as caught:
                engine.add_request(prompt(llm), PARAMS)
            depths.add(len(caught.traceback))
        assert len(depths) == 1  # an error that is raised again gathers frames, and their requests
        await engine.stop()

    asyncio.run(main())


def test_draining_finishes_what_is_here_and_refuses_what_comes(llm: LLM) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        request = engine.add_request(prompt(llm), PARAMS)
        draining = asyncio.ensure_future(engine.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            engine.add_request(prompt(llm), PARAMS)
        assert await draining and request.finished is not None
        assert len(tokens(await request.result())) == 12

    run(llm, test)


def test_what_is_not_finished_when_it_stops_is_told(llm: LLM) -> None:
    async def test(engine: AsyncEngine, held: Held) -> None:
        held.may_step.clear()
        request = engine.add_request(prompt(llm), PARAMS)
        assert not await engine.drain(0.05)
        reading: asyncio.Task[Any] = asyncio.ensure_future(request.result())
        stopping = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0.05)
        held.may_step.set()
        await stopping
        with pytest.raises(Draining, match="shut down"):
            await reading

    async def main() -> None:
        held = Held(llm.model, llm.tokenizer)
        await test(AsyncEngine(held), held)

    asyncio.run(main())


def test_every_request_is_counted_out_once(llm: LLM) -> None:
    async def test(engine: AsyncEngine, _: Held) -> None:
        requests: list[AsyncRequest] = []
        for i in range(12):
            params = SamplingParams(max_tokens=4, n=2, seed=i)
            requests.append(engine.add_request(prompt(llm), params, streams=bool(i % 2)))
            if i % 3 == 0:
                requests[-1].abort()
        for i, request in enumerate(requests):
            if i % 3:
                assert (await request.result()).finished
            request.abort()
        assert await engine.drain(10)

    run(llm, test)
