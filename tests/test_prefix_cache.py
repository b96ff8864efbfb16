"""The prefix cache: the longest hit, what it holds, and what goes first when pages run out."""

from __future__ import annotations

import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from octavo import SamplingParams
from octavo.cache import CacheLayout, PagePool, RaggedCache, block_digests, tokens_of_page
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sequence
from tests.checkpoints import small_config

PAGE_SIZE = tokens_of_page(torch.float32)
WINDOW = 3 * PAGE_SIZE


def new_pool(n_pages: int, windows: tuple[int | None, ...] = (None, WINDOW)) -> PagePool:
    config = small_config(windows, n_layers=len(windows), max_seq_len=100_000)
    return PagePool(CacheLayout.of(config, torch.float32), n_pages)


def store(pool: PagePool, tokens: list[int], chunk: int = PAGE_SIZE) -> RaggedCache:
    """A sequence that takes over what is known and stores the rest, as the engine does."""
    digests = block_digests(tokens, PAGE_SIZE)
    cache = RaggedCache(pool)
    hit = pool.prefix.match(digests[: (len(tokens) - 1) // PAGE_SIZE])
    if hit is not None:
        cache.take_over(hit)
    known = cache.length // PAGE_SIZE
    while cache.length < len(tokens):
        n = min(chunk, len(tokens) - cache.length)
        cache.prepare(n)
        cache.length += n
        known = cache.remember(digests, known)
    return cache


def hit_tokens(pool: PagePool, tokens: list[int]) -> int:
    hit = pool.prefix.match(block_digests(tokens, PAGE_SIZE))
    return hit.n_blocks * PAGE_SIZE if hit else 0


def text(seed: int, n_blocks: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(n_blocks * PAGE_SIZE)]


def test_digests_depend_on_all_tokens_before_and_grow() -> None:
    tokens = text(0, 4)
    digests = block_digests([*tokens, 1, 2], PAGE_SIZE)
    assert len(digests) == 4 and len(set(digests)) == 4
    assert block_digests(tokens, PAGE_SIZE, digests[:2]) == digests
    other = block_digests([7, *tokens[1:]], PAGE_SIZE)
    assert all(a != b for a, b in zip(digests, other, strict=True))
    repeated = block_digests(tokens[:PAGE_SIZE] * 3, PAGE_SIZE)
    assert len(set(repeated)) == 3


def test_a_hit_far_longer_than_the_window_needs_its_last_window_alone() -> None:
    pool = new_pool(1000)
    tokens = text(1, 40)
    store(pool, tokens).free()
    assert pool.n_held == 0 and hit_tokens(pool, tokens) == 40 * PAGE_SIZE
    again = store(pool, tokens + text(2, 1))
    full, windowed = again.tables
    assert full.first == 0 and windowed.first > 0
    assert again.length == 41 * PAGE_SIZE
    # 40 blocks were taken over, in the full layer; in the windowed one what is still seen.
    assert pool.n_held == again.n_pages == 41 + 41 - windowed.first


def test_a_hit_is_taken_over_in_one_array_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = new_pool(1000)
    tokens = text(1, 40)
    store(pool, tokens).free()
    hit = pool.prefix.match(block_digests(tokens, PAGE_SIZE))
    assert hit is not None
    array = Mock(wraps=np.array)
    monkeypatch.setattr(np, "array", array)
    cache = RaggedCache(pool)
    cache.take_over(hit)
    assert array.call_count == 2 and cache.n_pages == hit.n_pages == pool.n_held


class Queue:
    """A scheduler and its pool without a model: steps store what they are given."""

    def __init__(self, n_pages: int, chunk: int = 4 * PAGE_SIZE) -> None:
        self.pool = new_pool(n_pages)
        self.scheduler = Scheduler(self.pool, 8, chunk, speculate=False)

    def add(self, request_id: int, tokens: list[int]) -> Sequence:
        params = SamplingParams(max_tokens=1000)
        sequence = Sequence(request_id, 0, tokens, params, 1000, None, None)
        self.scheduler.waiting.append(sequence)
        return sequence

    def step(self) -> None:
        for each in self.scheduler.schedule():
            assert each.sequence.cache is not None
            each.sequence.cache.length += each.n_tokens
            self.scheduler.remember(each.sequence)
            if not each.sequence.n_pending:
                each.sequence.append(3)


def test_a_known_prompt_that_waits_for_pages_is_not_matched_again_and_takes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = Queue(n_pages=60)
    known = text(1, 20)
    store(queue.pool, known).free()
    match = Mock(wraps=queue.pool.prefix.match)
    monkeypatch.setattr(queue.pool.prefix, "match", match)
    running = queue.add(0, text(2, 12))
    for _ in range(4):
        queue.step()
    waiting = queue.add(1, known + text(3, 18))
    for _ in range(10):
        queue.step()
    assert list(queue.scheduler.waiting) == [waiting]
    assert match.call_count == 2  # one for each
    assert not any(block.was_hit for block in queue.pool.prefix._blocks.values())
    queue.scheduler.finish(running)
    queue.step()
    assert waiting.n_cached == 20 * PAGE_SIZE


def test_a_prompt_that_waits_is_let_in_once_enough_of_it_is_known() -> None:
    """Though no page has become free: another sequence stores the same beginning."""
    queue = Queue(n_pages=60)
    shared = text(1, 24)
    queue.add(0, shared + text(2, 1))
    waiting = queue.add(1, shared + text(3, 1))
    n_steps = 0
    while queue.scheduler.waiting and n_steps < 20:
        queue.step()
        n_steps += 1
    assert 2 < n_steps < 20 and len(queue.scheduler.running) == 2
    assert waiting.n_cached


def test_a_hit_ends_at_the_last_point_that_is_whole() -> None:
    pool = new_pool(1000)
    tokens = text(1, 20)
    store(pool, tokens).free()
    branch = tokens[: 10 * PAGE_SIZE] + text(3, 5)
    # Under no pressure the windowed pages behind block 10 are still there.
    assert hit_tokens(pool, branch) == 10 * PAGE_SIZE
    assert hit_tokens(pool, text(4, 5)) == 0


def test_pages_that_serve_only_shorter_hits_go_first() -> None:
    """Of the windowed layer, what the window has passed, though it was let go of last."""
    old, new = text(1, 10), text(2, 40)
    pool = new_pool(10 + 10 + 40 + 40)
    store(pool, old).free()
    store(pool, new).free()  # its windowed pages pass, and are younger than all of `old`
    assert pool.prefix.n_unheld_pages == pool.n_pages
    # One block takes a page of each kind: all of it must come from passed pages, of which the
    # old sequence has 7 and the new one 37.
    taken = RaggedCache(pool)
    taken.prepare(20 * PAGE_SIZE)
    assert hit_tokens(pool, old) == 10 * PAGE_SIZE
    assert hit_tokens(pool, new) == 40 * PAGE_SIZE
    assert hit_tokens(pool, new[: 20 * PAGE_SIZE]) < 20 * PAGE_SIZE


def test_least_recently_used_goes_first_and_from_its_end() -> None:
    pool = new_pool(30, windows=(None,))
    first, second = text(1, 10), text(2, 10)
    store(pool, first).free()
    store(pool, second).free()
    store(pool, [*first, 1]).free()  # used again, all ten blocks of it
    taken = RaggedCache(pool)
    taken.prepare(14 * PAGE_SIZE)  # 10 pages are free: four of `second` must go
    assert hit_tokens(pool, second) == 6 * PAGE_SIZE
    assert hit_tokens(pool, first) == 10 * PAGE_SIZE
    taken.prepare(22 * PAGE_SIZE)
    assert hit_tokens(pool, second) == 0 and hit_tokens(pool, first) == 8 * PAGE_SIZE


def test_a_passed_page_that_was_hit_is_kept_like_the_others() -> None:
    """A system prompt longer than the window, which many conversations share."""
    pool = new_pool(200)
    system = text(1, 10)
    store(pool, system + text(2, 10)).free()
    store(pool, system + text(3, 10)).free()  # hits at block 10: those pages proved useful
    RaggedCache(pool).prepare(65 * PAGE_SIZE)
    assert hit_tokens(pool, system + text(4, 10)) == 10 * PAGE_SIZE


def test_shared_pages_are_counted_once_and_outlive_their_first_owner() -> None:
    pool = new_pool(100, windows=(None,))
    tokens = text(1, 10)
    first = store(pool, tokens)
    second = store(pool, tokens + text(2, 2))
    assert pool.n_held == 12
    first.free()
    assert pool.n_held == 12
    second.free()
    assert pool.n_held == 0 and pool.prefix.n_unheld_pages == 12


def test_nothing_is_remembered_when_it_is_off() -> None:
    config = small_config((None,), n_layers=1)
    pool = PagePool(CacheLayout.of(config, torch.float32), 50, enable_prefix_caching=False)
    tokens = text(1, 5)
    store(pool, tokens).free()
    assert hit_tokens(pool, tokens) == 0 and pool.prefix.n_unheld_pages == 0


@pytest.mark.parametrize("windows", [(None, WINDOW), (None,), (WINDOW,), (None, WINDOW, 5)])
def test_random_use_never_loses_or_doubles_a_page(windows: tuple[int | None, ...]) -> None:
    """Sequences that share beginnings come, grow, fork and go in a pool that is always short."""
    generator = random.Random(0)
    pool = new_pool(60 * len(windows), windows)
    live: list[tuple[RaggedCache, list[int]]] = []
    prompts = [text(seed, 12) for seed in range(4)]
    n_hits = 0
    for step in range(600):
        if live and (len(live) > 3 or generator.random() < 0.4):
            cache, _ = live.pop(generator.randrange(len(live)))
            cache.free()
        elif live and generator.random() < 0.2:
            cache, tokens = generator.choice(live)
            if pool.n_available >= sum(pool.layout.rows):
                live.append((cache.copy(), tokens))
        else:
            cut = generator.randrange(1, 13) * PAGE_SIZE
            tokens = generator.choice(prompts)[:cut] + text(1000 + step, generator.randrange(1, 4))
            if pool.layout.pages_needed(len(tokens), 3 * PAGE_SIZE) > pool.n_available:
                continue
            n_hits += hit_tokens(pool, tokens) > 0
            live.append((store(pool, tokens, chunk=generator.choice((5, 16, 40))), tokens))
        held = {
            page
            for cache, _ in live
            for table in cache.tables
            for block in table.blocks
            for page in block.pages
        }
        free = set(pool._free) | set(range(pool._n_touched, pool.n_pages))
        cached = {page for block in pool.prefix._blocks.values() for page in block.pages}
        assert pool.n_held == len(held) and not held & free and not cached & free
        assert len(held | free | cached) == pool.n_pages
        for cache, _ in live:
            for kind, table in enumerate(cache.tables):
                needed = pool.layout.first_block(kind, cache.length)
                assert table.first <= needed
                for index, block in enumerate(table.blocks, table.first):
                    assert tuple(table.ids[:, index].tolist()) == block.pages
    assert n_hits > 50
    for cache, _ in live:
        cache.free()
    assert pool.n_held == 0


def test_the_longest_hit_is_that_of_a_search_by_brute_force() -> None:
    generator = random.Random(1)
    pool = new_pool(70)
    prompts = [text(seed, 14) for seed in range(3)]
    layout = pool.layout
    for step in range(300):
        tokens = generator.choice(prompts)[: generator.randrange(1, 15) * PAGE_SIZE]
        tokens = tokens + text(2000 + step, 1)
        digests = block_digests(tokens, PAGE_SIZE)
        longest = max(
            (
                n
                for n in range(1, len(digests) + 1)
                if all(
                    (kind, digests[i]) in pool.prefix._blocks
                    for kind in range(2)
                    for i in range(layout.first_block(kind, n * PAGE_SIZE), n)
                )
            ),
            default=0,
        )
        assert hit_tokens(pool, tokens) == longest * PAGE_SIZE
        store(pool, tokens).free()
