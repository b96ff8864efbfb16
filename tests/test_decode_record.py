"""Recorded decode steps: bit by bit what the same steps compute when they run a call at a time."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from octavo import LLM, SamplingParams
from octavo.bench.random_model import random_model
from octavo.bench.shapes import find_shape, quantised
from octavo.cache import CacheLayout, PagePool, RaggedCache, kv_dtype
from octavo.engine import decode_record
from octavo.engine.decode_record import RecordedDecode, arena_bytes, recording_bytes
from octavo.engine.engine import Engine
from octavo.engine.speculation import MOST
from octavo.engine.step_limits import StepLimits
from octavo.kernels.cpu import library, linear
from octavo.kernels.cpu.recording import Recording
from octavo.model import Transformer
from octavo.model.linear import Linear
from tests.test_engine import greedy, prompts, run, tokens_of
from tests.threads import threads

pytestmark = pytest.mark.skipif(library.load() is None, reason="no C++ library")

CPU = torch.device("cpu")
LIMITS = StepLimits(max_num_seqs=6, max_model_len=256, speculate=True)
MODELS = {"bf16": ("bf16", "bf16"), "w8a8": ("w8a8", "bf16"), "w8a8, int8 head": ("w8a8", "int8")}


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", dtype="bfloat16", device="cpu", max_model_len=1024)


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> Transformer:
    """Random weights of the bundled model's shape, whose windows are of 64 tokens."""
    return random_model(quantised(find_shape("demo", None), *request.param), 0, CPU)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The recordings that were replayed, as they ran."""
    seen: list[Recording] = []
    replay = Recording.replay

    def watched(self: Recording) -> None:
        seen.append(self)
        replay(self)

    monkeypatch.setattr(Recording, "replay", watched)
    return seen


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def new_pool(model: Transformer, kv_cache_dtype: str = "int8") -> PagePool:
    layout = CacheLayout.of(model.config, kv_dtype(kv_cache_dtype, model.dtype))
    return PagePool(layout, 400, enable_prefix_caching=False)


def recorded(model: Transformer, pool: PagePool) -> RecordedDecode:
    return RecordedDecode(model, pool, LIMITS)


def fill(model: Transformer, pool: PagePool, lens: Sequence[int]) -> list[RaggedCache]:
    """Caches that hold random tokens, the same ones for the same lengths."""
    generator = torch.Generator().manual_seed(1)
    caches = [RaggedCache(pool) for _ in lens]
    tokens = torch.randint(model.config.vocab_size, (sum(lens),), generator=generator)
    model(tokens, lens, caches)
    return caches


def step(
    decode: RecordedDecode,
    ids: Sequence[int],
    caches: list[RaggedCache],
    query_lens: Sequence[int] | None = None,
) -> list[Tensor]:
    for cache, n in zip(caches, query_lens or [1] * len(caches), strict=True):
        cache.prepare(n)
    return [result.clone() for result in decode.run(ids, caches, query_lens)]


@pytest.mark.parametrize("kv_cache_dtype", ["bf16", "int8"])
def test_steps_of_all_sizes_are_those_that_run_a_call_at_a_time(
    model: Transformer, kv_cache_dtype: str, replays: list[Recording]
) -> None:
    pool = new_pool(model, kv_cache_dtype)
    decode = recorded(model, pool)
    lens = [100, 3, 63, 17]
    own, plain = fill(model, pool, lens), fill(model, pool, lens)
    pages = {cache: [table.first for table in cache.tables] for cache in own}
    generator = torch.Generator().manual_seed(2)
    for i in range(60):  # into new pages, and out of what windows have passed
        some = [j for j in range(len(lens)) if i % 7 != j]
        ids = torch.randint(model.config.vocab_size, (len(some),), generator=generator)
        found = step(decode, ids.tolist(), [own[j] for j in some])
        hidden = model.hidden(ids, [1] * len(some), [plain[j] for j in some])
        assert torch.equal(found[0], hidden) and torch.equal(found[1], model.logits(hidden))
        assert found[1].dtype == torch.float32
        assert [cache.length for cache in own] == [cache.length for cache in plain]
    # Of both sizes the first step ran plainly, and the second was recorded; one replay is a check.
    assert len(set(replays)) == 2 and len(replays) == 60 - 4 + 1
    assert any(pages[cache] != [table.first for table in cache.tables] for cache in own)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not take it back")
def test_a_step_gives_back_what_a_prompt_took(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library._of_thread, "kept", None)
    monkeypatch.setattr(library, "LARGE_BYTES", 64)
    monkeypatch.setattr(library, "FEW_BYTES", 0)
    pool = new_pool(model)
    decode, caches = recorded(model, pool), fill(model, pool, [100])
    arena = library._of_thread.kept
    assert arena is not None
    of_prompt = arena.memory[: arena._stop]
    assert of_prompt.any()
    for i in range(3):  # the third is a replay, which makes nothing there
        step(decode, [i], caches)
    assert not of_prompt.any()


def test_steps_with_guesses_are_those_that_run_a_call_at_a_time(
    model: Transformer, replays: list[Recording]
) -> None:
    """Also where guesses prove wrong and are forgotten, across pages and windows."""
    pool = new_pool(model)
    decode = recorded(model, pool)
    own, plain = fill(model, pool, [70]), fill(model, pool, [70])
    generator = torch.Generator().manual_seed(2)
    for n, n_right in [(1, 1), (5, 3), (16, 16), (5, 5), (1, 1), (5, 1), (16, 2), (5, 5), (16, 9)]:
        ids = torch.randint(model.config.vocab_size, (n,), generator=generator)
        assert decode.takes([n])
        found = step(decode, ids.tolist(), own, [n])
        hidden = model.hidden(ids, [n], plain)
        assert torch.equal(found[0], hidden) and torch.equal(found[1], model.logits(hidden))
        for cache in (*own, *plain):
            cache.length -= n - n_right
    # The first of all is a check; the one token was recorded last.
    assert len(set(replays)) == 2 and len(replays) == 1 + 3
    assert not decode.takes([17]) and not decode.takes([1, 2]) and decode.takes([1, 1])


def test_recordings_share_their_memory_and_are_replayed_in_any_order(
    model: Transformer, replays: list[Recording]
) -> None:
    pool = new_pool(model)
    decode = recorded(model, pool)
    caches = fill(model, pool, [9, 30, 12])
    for count in (1, 3, 2, 3, 1, 2, 2, 1, 3, 1):
        before = [cache.length for cache in caches]
        found = step(decode, list(range(count)), caches[:count])
        for cache, length in zip(caches, before, strict=True):
            cache.length = length
        hidden = model.hidden(torch.arange(count), [1] * count, caches[:count])
        assert torch.equal(found[0], hidden) and torch.equal(found[1], model.logits(hidden))
    assert len(set(replays)) == 3


def test_only_its_own_slots_are_written(model: Transformer, replays: list[Recording]) -> None:
    pool = new_pool(model)
    decode = recorded(model, pool)
    page = pool.layout.page_size
    caches = fill(model, pool, [page, 5])
    for _ in range(3):
        for tensor in (pool.keys, pool.values):
            tensor.fill_(99)
        step(decode, [7, 8], caches)
        own = {
            (int(table.ids[row, (cache.length - 1) // page]), (cache.length - 1) % page)
            for cache in caches
            for table in cache.tables
            for row in range(len(table.ids))
        }
        for tensor in (pool.keys, pool.values):
            written = (tensor != 99).flatten(4).any(-1).any(0).any(1)
            assert {tuple(slot) for slot in written.nonzero().tolist()} == own
    assert replays


def test_another_number_of_threads_is_another_recording(
    model: Transformer, replays: list[Recording]
) -> None:
    pool = new_pool(model)
    decode = recorded(model, pool)
    caches = fill(model, pool, [20])
    for n_threads in (1, 2):
        with threads(n_threads):
            for _ in range(3):
                step(decode, [1], caches)
    assert len(set(replays)) == 2


@pytest.mark.parametrize("speculate", [False, True])
def test_an_engine_answers_as_it_does_without(
    demo: LLM, replays: list[Recording], speculate: bool
) -> None:
    encoded = [prompt[: 25 + 12 * i] for i, prompt in enumerate(prompts(demo.tokenizer, 9))]
    params = [greedy(4 + 5 * i) for i in range(len(encoded))]
    answers = []
    for records in (True, False):
        made = Engine(
            demo.model, demo.tokenizer, max_model_len=256, max_num_seqs=4, speculate=speculate
        )
        assert isinstance(made.decode, RecordedDecode)
        made.warm_up()
        if not records:
            made.decode = None
        answers.append(tokens_of(run(made, encoded, params)))
        if records:
            assert len(set(replays)) > 1 and len(replays) > 5
            replays.clear()
    assert answers[0] == answers[1] and not replays


def test_copies_and_shared_prefixes_answer_as_they_do_without(
    demo: LLM, replays: list[Recording]
) -> None:
    prompt = prompts(demo.tokenizer, 1, seed=3)[0]
    params = SamplingParams(n=3, max_tokens=20, seed=1, temperature=0.8, ignore_eos=True)
    made, plain = (Engine(demo.model, demo.tokenizer, max_model_len=512) for _ in range(2))
    plain.decode = None
    for _ in range(2):
        expected = tokens_of(run(plain, [prompt] * 2, params))
        assert tokens_of(run(made, [prompt] * 2, params)) == expected
    assert replays and made.stats().cached_tokens_total > 0


def test_a_model_that_pytorch_computes_too_runs_as_it_did(
    replays: list[Recording], caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM("demo", dtype="float32", device="cpu", max_model_len=256)
    encoded = prompts(llm.tokenizer, 2)
    made, plain = (Engine(llm.model, llm.tokenizer, max_model_len=1024) for _ in range(2))
    plain.decode = None
    with caplog.at_level(logging.INFO, "octavo"):
        assert tokens_of(run(made, encoded, greedy())) == tokens_of(run(plain, encoded, greedy()))
    assert not replays
    assert caplog.records
    for record in caplog.records:  # of each size
        assert record.levelno == logging.INFO and "PyTorch's" in record.getMessage()


def test_sizes_that_pytorch_computes_leave_the_others_as_they_are(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, replays: list[Recording]
) -> None:
    """As a bf16 head's, of which the library takes no more than some tokens."""
    for name in ("MOST_TOKENS", "MOST_TOKENS_AVX512", "MOST_TOKENS_AMX"):
        monkeypatch.setattr(linear, name, 2)
    pool = new_pool(model)
    decode = recorded(model, pool)
    lens = [20, 30, 40]
    own, plain = fill(model, pool, lens), fill(model, pool, lens)
    for count in (3, 3, 3, 2, 2, 2, 3, 2):
        found = step(decode, list(range(count)), own[:count])
        hidden = model.hidden(torch.arange(count), [1] * count, plain[:count])
        assert torch.equal(found[0], hidden) and torch.equal(found[1], model.logits(hidden))
    has_bf16 = any(isinstance(each, Linear) for each in model.modules())
    assert len(set(replays)) == (1 if has_bf16 else 2)


def test_a_replay_that_computes_wrong_is_said_and_not_used(
    demo: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "replay", lambda _: None)
    encoded = prompts(demo.tokenizer, 2)
    made, plain = (Engine(demo.model, demo.tokenizer, max_model_len=1024) for _ in range(2))
    plain.decode = None
    with caplog.at_level(logging.WARNING, "octavo"):
        assert tokens_of(run(made, encoded, greedy())) == tokens_of(run(plain, encoded, greedy()))
    [record] = caplog.records
    assert "computes wrong" in record.getMessage()


def test_memory_that_does_not_suffice_is_said_and_steps_run_as_they_did(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decode_record, "arena_bytes", lambda *_: 2000)
    pool = new_pool(model)
    decode = recorded(model, pool)
    own, plain = fill(model, pool, [20]), fill(model, pool, [20])
    with caplog.at_level(logging.INFO, "octavo"):
        for _ in range(4):
            found = step(decode, [1], own)
            hidden = model.hidden(torch.tensor([1]), [1], plain)
            assert torch.equal(found[0], hidden)
    [record] = caplog.records
    assert "do not fit" in record.getMessage()


def test_an_interrupted_step_can_be_run_again(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = new_pool(model)
    decode = recorded(model, pool)
    own, plain = fill(model, pool, [20]), fill(model, pool, [20])
    run_layers = model.run_layers

    def interrupted(*arguments: object) -> Tensor:
        monkeypatch.setattr(model, "run_layers", run_layers)
        raise KeyboardInterrupt

    for i in range(4):
        if i == 1:
            monkeypatch.setattr(model, "run_layers", interrupted)
            with pytest.raises(KeyboardInterrupt):
                step(decode, [i], own)
        found = step(decode, [i], own)
        assert torch.equal(found[0], model.hidden(torch.tensor([i]), [1], plain))


def test_the_bytes_of_recordings_are_no_less_than_what_they_keep(model: Transformer) -> None:
    pool = new_pool(model)
    decode = recorded(model, pool)
    caches = fill(model, pool, [20] * LIMITS.max_num_seqs)
    n_calls, n_tokens = 0, max(LIMITS.max_num_seqs, decode_record.MOST_TOKENS)
    for count in range(1, LIMITS.max_num_seqs + 1):
        for _ in range(2):
            step(decode, [1] * count, caches[:count])
    for n in range(2, decode_record.MOST_TOKENS + 1):
        for _ in range(2):
            step(decode, [1] * n, caches[:1], [n])
            caches[0].length -= n
    for each in decode._steps.values():
        assert each is not None
        used = each.recording._arena._stop
        assert 64 < used <= arena_bytes(model, n_tokens)
        n_calls += len(each.recording._made)
    assert len(decode._steps) == LIMITS.max_num_seqs + MOST
    planned = len(decode._steps) * (model.config.n_layers + 1) * decode_record.CALLS_A_LAYER
    assert n_calls <= planned
    least = arena_bytes(model, n_tokens) + planned * decode_record.CALL_BYTES
    least += sum(table.nbytes for table in decode._page_tables)
    estimate = recording_bytes(pool.layout, model, LIMITS)
    assert estimate >= least
