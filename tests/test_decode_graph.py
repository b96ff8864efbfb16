"""Decode steps in padded batches and fixed places: what they compute is what a plain step computes.

Without a GPU the same steps run kernel by kernel. The model is the bundled one in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.cache import CacheLayout, PagePool, RaggedCache
from octavo.cache.planner import activation_bytes
from octavo.engine import decode_graph
from octavo.engine.decode_graph import Bucket, DecodeGraphs, graph_bytes
from octavo.engine.decode_record import RecordedDecode
from octavo.engine.engine import Engine
from octavo.engine.step_limits import StepLimits
from tests.test_engine import CHUNK, engine, greedy, prompts, run, tokens_of


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", dtype="float32", device="cpu", max_model_len=4096)


@pytest.fixture(autouse=True)
def _short_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that answers grow from one bucket into the next."""
    monkeypatch.setattr(decode_graph, "SHORTEST_CONTEXT", 32)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """The bucket of each step, as they run."""
    buckets: list[Bucket] = []
    compute = DecodeGraphs._compute

    def watched(self: DecodeGraphs, bucket: Bucket, *rest: Any) -> None:
        buckets.append(bucket)
        compute(self, bucket, *rest)

    monkeypatch.setattr(DecodeGraphs, "_compute", watched)
    return buckets


def with_decode(made: Engine, capture: bool = False) -> Engine:
    limits = StepLimits(made.max_num_seqs, made.max_model_len, made.scheduler.speculate)
    made.decode = DecodeGraphs(made.model, made.pool, limits, capture)
    return made


@pytest.mark.parametrize("speculate", [False, True])
def test_batches_that_grow_and_shrink_give_the_same_tokens(
    demo: LLM, used: list[Bucket], speculate: bool
) -> None:
    encoded = [prompt[: 25 + 12 * i] for i, prompt in enumerate(prompts(demo.tokenizer, 9))]
    params = [greedy(4 + 5 * i) for i in range(len(encoded))]
    expected = tokens_of(run(engine(demo, max_num_seqs=6), encoded, params))
    assert not used
    made = with_decode(engine(demo, max_num_seqs=6, speculate=speculate))
    assert tokens_of(run(made, encoded, params)) == expected
    if speculate:
        with_guesses = {bucket for bucket in used if bucket.guesses}
        assert made.stats().accepted_tokens_total > 0
        assert len({bucket.size for bucket in with_guesses}) > 1
        assert len({bucket.context for bucket in with_guesses}) > 1
    else:
        assert {bucket.size for bucket in used} == {1, 2, 4, 6}
        assert {bucket.context for bucket in used} == {128, 512}


def test_preempted_answers_give_the_same_tokens(demo: LLM, used: list[Bucket]) -> None:
    layout = CacheLayout.of(demo.model.config, torch.float32)
    short = [prompt[:40] for prompt in prompts(demo.tokenizer, 4)]
    expected = tokens_of(run(engine(demo), short, greedy(100)))
    made = with_decode(engine(demo, n_pages=2 * layout.pages_needed(140, CHUNK), max_model_len=140))
    assert tokens_of(run(made, short, greedy(100))) == expected
    assert made.stats().preemptions_total > 0 and used


def test_shared_prefixes_and_copies_give_the_same_tokens(demo: LLM, used: list[Bucket]) -> None:
    prompt = prompts(demo.tokenizer, 1, seed=3)[0]
    params = SamplingParams(n=3, max_tokens=20, seed=1, temperature=0.8, ignore_eos=True)
    expected = tokens_of(run(engine(demo), [prompt] * 2, params))
    made = with_decode(engine(demo))
    for _ in range(2):
        assert tokens_of(run(made, [prompt] * 2, params)) == expected
    assert made.stats().cached_tokens_total > 0 and used


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 7, 3], [16], [1, 2], [5, 5, 6]])
def test_hidden_states_and_logits_are_those_of_a_plain_step(
    demo: LLM, query_lens: list[int]
) -> None:
    encoded = prompts(demo.tokenizer, len(query_lens))
    made = with_decode(engine(demo, speculate=True))
    assert made.decode is not None
    padded, plain = ([RaggedCache(made.pool) for _ in encoded] for _ in range(2))
    lens = [len(prompt) for prompt in encoded]
    for caches in (padded, plain):
        demo.model(torch.tensor([token for prompt in encoded for token in prompt]), lens, caches)
    for first in (5, 6, 7):
        tokens = list(range(first, first + sum(query_lens)))
        for cache, n in zip(padded, query_lens, strict=True):
            cache.prepare(n)
        hidden, logits = made.decode.run(tokens, padded, query_lens)
        expected = demo.model.hidden(torch.tensor(tokens), query_lens, plain)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, demo.model.logits(expected), rtol=1e-4, atol=1e-4)
        assert [cache.length for cache in padded] == [cache.length for cache in plain]


def test_the_device_is_told_the_lengths_that_the_host_knows(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[list[int], list[int]]] = []
    compute = demo.model.run

    def watched(ids: Any, positions: Any, lengths: Any, batch: Any, *rest: Any) -> torch.Tensor:
        for lens in (batch.query_lens, batch.kv_lens):
            on_device = lens.on(torch.device("cpu"))
            assert on_device.dtype == torch.int32
            told.append((on_device.tolist(), list(lens)))
        return compute(ids, positions, lengths, batch, *rest)

    monkeypatch.setattr(demo.model, "run", watched)
    run(with_decode(engine(demo, speculate=True)), prompts(demo.tokenizer, 3), greedy(25))
    # Steps with guesses are filled up to 16 tokens.
    assert len(told) >= 8 and any(len(lens) > 1 and sum(lens) == 16 for _, lens in told[::2])
    for on_device, on_host in told:
        assert on_device == on_host


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    ("query_lens", "n_filling"),
    [([1] * 5, 1), ([1, 4, 1, 1, 2], 7)],  # to 8 sequences, all at the same place; to 16 tokens
)
def test_padding_is_stored_in_the_spare_page_and_nowhere_else(
    demo: LLM, dtype: torch.dtype, query_lens: list[int], n_filling: int
) -> None:
    pool = PagePool(CacheLayout.of(demo.model.config, dtype), 60)
    decode = DecodeGraphs(demo.model, pool, StepLimits(8, 256, speculate=True), capture=False)
    caches = [RaggedCache(pool) for _ in query_lens]
    for cache, n in zip(caches, query_lens, strict=True):
        cache.prepare(n)
    stored = [
        x for x in (pool.keys, pool.values, pool.key_scales, pool.value_scales) if x is not None
    ]
    for tensor in stored:
        tensor.fill_(99)
    decode.run(list(range(5, 5 + sum(query_lens))), caches, query_lens)
    expected = [
        [int(page), offset]
        for cache, n in zip(caches, query_lens, strict=True)
        for table in cache.tables
        for page in table.ids[:, 0]
        for offset in range(n)
    ]
    own = {page for page, _ in expected}
    expected += [[pool.spare_page, offset] for offset in range(n_filling)]
    for tensor in stored:
        written = (tensor != 99).flatten(4).any(-1) if tensor.dim() == 5 else tensor != 99
        slots = written.any(0).any(1).nonzero().tolist()  # [page, offset]
        assert sorted(slots) == sorted(expected)
    assert pool.spare_page not in own and len(own) == 5 * sum(pool.layout.rows)


def test_the_spare_page_is_never_handed_out(demo: LLM) -> None:
    pool = engine(demo, n_pages=100, max_model_len=64).pool
    rows = pool.layout.rows[0]
    taken = [page for block in pool.allocate(0, 0, 100 // rows) for page in block.pages]
    assert sorted(taken) == list(range(100)) and pool.spare_page == 100
    assert pool.keys.shape[1] == 101


def test_a_cpu_engine_has_no_graphs(demo: LLM) -> None:
    assert isinstance(engine(demo).decode, RecordedDecode)


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch, graph: type, capture: Any) -> None:
    """In place of what graphs need of CUDA: the class of a graph, and what captures one."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.parametrize("fault", ["cannot be captured", "computes wrong"])
def test_steps_that_cannot_be_captured_or_come_out_wrong_run_plainly(
    demo: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    class Graph:
        """Replays nothing, so that nobody writes the results."""

        def replay(self) -> None:
            pass

    def capture(*_: Any, **__: Any) -> Any:
        if fault == "cannot be captured":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return nullcontext()

    stand_in_for_cuda(monkeypatch, Graph, capture)
    encoded = prompts(demo.tokenizer, 2)
    expected = tokens_of(run(engine(demo), encoded, greedy()))
    made = with_decode(engine(demo), capture=True)
    with caplog.at_level(logging.WARNING, "octavo"):
        assert tokens_of(run(made, encoded, greedy())) == expected
    [record] = caplog.records
    message = record.getMessage()
    assert "\n" not in message and "do not run as CUDA graphs" in message
    reason = "wrong" if fault == "computes wrong" else "not permitted"
    assert reason in message


@dataclass
class FakeGPU:
    """What captured and replayed graphs did.

    Attributes:
        computed: the bucket of each step that was computed, with the lengths that the host knew.
        replayed: the bucket of each replay.
    """

    computed: list[tuple[Bucket, Any]] = field(default_factory=list)
    replayed: list[Bucket] = field(default_factory=list)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    """Steps and replays take the lengths that a device reads, whatever the host's are."""
    seen = FakeGPU()
    compute = DecodeGraphs._compute
    decodes: list[DecodeGraphs] = []

    def lengths(decode: DecodeGraphs, bucket: Bucket) -> tuple[list[int], list[int]]:
        inputs = decode._split(decode._inputs, bucket)
        return inputs.query_lens.tolist(), inputs.kv_lens.tolist()

    class Graph:
        bucket: Bucket

        def replay(self) -> None:
            seen.replayed.append(self.bucket)
            compute(decodes[-1], self.bucket, lengths(decodes[-1], self.bucket))

    def watched(self: DecodeGraphs, bucket: Bucket, lens: Any = None) -> None:
        decodes.append(self)
        seen.computed.append((bucket, lens))
        compute(self, bucket, lengths(self, bucket))

    monkeypatch.setattr(DecodeGraphs, "_compute", watched)

    @contextmanager
    def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        yield
        graph.bucket = seen.computed[-1][0]

    stand_in_for_cuda(monkeypatch, Graph, capture)
    return seen


@pytest.mark.parametrize("speculate", [False, True])
def test_a_graph_is_captured_once_for_each_bucket_and_replayed(
    demo: LLM, gpu: FakeGPU, speculate: bool
) -> None:
    encoded = [prompt[:20] for prompt in prompts(demo.tokenizer, 3)]
    params = [greedy(10 + 7 * i) for i in range(3)]
    expected = tokens_of(run(engine(demo), encoded, params))
    made = with_decode(engine(demo, speculate=speculate), capture=True)
    assert tokens_of(run(made, encoded, params)) == expected
    # Each bucket is computed with its bounds, plainly and then to be captured.
    buckets = {bucket for bucket, _ in gpu.computed}
    assert len(gpu.computed) == 2 * len(buckets) and len(buckets) > 1
    assert all(lens is None for _, lens in gpu.computed)
    for bucket in buckets:  # with guesses, one more sequence brings the rest of 16 tokens
        n, most = (bucket.size + 1, 16) if bucket.guesses else (bucket.size, 1)
        assert bucket.bounds == ([most] * n, [bucket.context] * n)
    assert {bucket.guesses for bucket in buckets} == {False, speculate}
    assert set(gpu.replayed) == buckets and len(gpu.replayed) > 2 * len(buckets)


@pytest.mark.parametrize("speculate", [False, True])
def test_a_warm_engine_captures_nothing_while_it_answers(
    demo: LLM, gpu: FakeGPU, speculate: bool
) -> None:
    encoded = [prompt[:20] for prompt in prompts(demo.tokenizer, 3)]
    expected = tokens_of(run(engine(demo), encoded, greedy(30)))
    made = engine(demo, max_num_seqs=5, max_model_len=200, speculate=speculate)
    with_decode(made, capture=True).warm_up()
    captured = [bucket for bucket, _ in gpu.computed[::2]]
    sizes, contexts = (5, 4, 2, 1), (200, 128, 32)  # the largest first
    assert captured == [
        Bucket(size, context, guesses)
        for guesses in ([True, False] if speculate else [False])  # 16 tokens, and 5
        for size in sizes
        for context in contexts
    ]
    assert gpu.replayed == captured  # each was compared with the plain step
    n_computed = len(gpu.computed)
    assert tokens_of(run(made, encoded, greedy(30))) == expected
    assert len(gpu.computed) == n_computed and len(gpu.replayed) > len(captured)
    made.warm_up()
    assert len(gpu.computed) == n_computed


def test_a_warm_up_writes_to_the_spare_page_alone(demo: LLM, gpu: FakeGPU) -> None:
    made = with_decode(engine(demo, max_model_len=200, speculate=True), capture=True)
    made.pool.keys.zero_()
    assert isinstance(made.decode, DecodeGraphs)
    made.decode.warm_up()
    written = made.pool.keys.flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    assert written == [made.pool.spare_page]


@pytest.mark.parametrize(
    ("max_model_len", "expected"),
    [
        (20, [20, 19, 10, 9, 5, 4, 2, 1]),
        (200, [64, 63, 32, 31, 16, 15, 8, 7, 4, 3, 2, 1]),  # a pass of CHUNK tokens
    ],
)
def test_a_warm_up_reads_prompts_of_all_kinds_of_lengths_and_keeps_nothing(
    demo: LLM, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch, max_model_len: int,
    expected: list[int],
) -> None:  # fmt: skip
    lengths: list[int] = []
    hidden = demo.model.hidden

    def watched(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(len(ids))
        return hidden(ids, *rest)

    monkeypatch.setattr(demo.model, "hidden", watched)
    made = with_decode(engine(demo, max_model_len=max_model_len), capture=True)
    made.warm_up()
    assert lengths == expected
    assert made.pool.n_held == 0 and not made.has_work
    assert made.stats().prompt_tokens_total == made.stats().generated_tokens_total == 0
    prompt = prompts(demo.tokenizer, 1)[0][:15]
    answers = [tokens_of(run(each, [prompt], greedy(4))) for each in (made, engine(demo))]
    assert answers[0] == answers[1]


def test_an_engine_without_graphs_is_warm_already(demo: LLM, used: list[Bucket]) -> None:
    engine(demo).warm_up()
    assert not used


@pytest.mark.parametrize("capture_fails_at", [1, 4])
def test_a_warm_up_ends_where_a_step_cannot_be_captured(
    demo: LLM, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capture_fails_at: int,
) -> None:  # fmt: skip
    calls: list[int] = []
    captured: Any = torch.cuda.graph  # the fixture's

    def capture(graph: Any, *_: Any, **__: Any) -> Any:
        calls.append(1)
        if len(calls) == capture_fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return captured(graph)

    monkeypatch.setattr(torch.cuda, "graph", capture)
    made = with_decode(engine(demo, max_model_len=200), capture=True)
    made.warm_up()
    assert len(calls) == capture_fails_at
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "CUDA out of memory" in record.getMessage() and "\n" not in record.getMessage()
    encoded = [prompts(demo.tokenizer, 1)[0][:20]]
    expected = tokens_of(run(engine(demo), encoded, greedy()))
    assert tokens_of(run(made, encoded, greedy())) == expected


@pytest.mark.parametrize("speculate", [False, True])
def test_the_bytes_of_graphs_are_no_less_than_the_places_they_read_and_write(
    demo: LLM, speculate: bool
) -> None:
    pool = engine(demo).pool
    limits = StepLimits(6, 512, speculate)
    made = DecodeGraphs(demo.model, pool, limits, capture=False)
    places = (made._inputs, made._hidden, made._logits)
    least = sum(place.numel() * place.itemsize for place in places)
    config, n_tokens = demo.model.config, 16 if speculate else 6
    n_kernels = len(made.buckets) * config.n_layers * decode_graph.KERNELS_A_LAYER
    pool_bytes = activation_bytes(config, n_tokens) + n_tokens * config.vocab_size * 8
    if speculate:  # the sums of keys' runs: of 16 tokens, all heads that share one of keys
        group = config.n_heads // config.n_kv_heads
        pool_bytes += decode_graph.RUNS * 16 * group * config.head_dim * 4
    expected = least + pool_bytes + n_kernels * decode_graph.KERNEL_BYTES
    assert graph_bytes(pool.layout, demo.model, limits) == expected


def test_a_guess_that_was_wrong_may_have_left_a_page_beyond_the_bucket(
    demo: LLM, used: list[Bucket]
) -> None:
    made = with_decode(engine(demo))
    assert made.decode is not None
    cache = RaggedCache(made.pool)
    prompt = prompts(demo.tokenizer, 1)[0]
    prompt = (prompt * 128)[: 128 - 1]
    demo.model(torch.tensor(prompt), [len(prompt)], [cache])
    cache.prepare(1 + 15)  # as for guesses, none of which was right
    _, logits = made.decode.run([5], [cache])
    assert used[-1].context == 128
    plain = demo.model(torch.tensor([*prompt, 5]), [128])[-1:]
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
