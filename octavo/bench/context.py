"""A cache that holds a long context without having computed it."""

from __future__ import annotations

from octavo.bench.random_model import RandomBlocks
from octavo.cache import PagePool, RaggedCache

INT8_SCALE = 1 / 64


def fill(cache: RaggedCache, n_tokens: int, chunk: int, blocks: RandomBlocks) -> None:
    """Make a cache hold `n_tokens` more tokens of random keys and values.

    It takes and gives back pages as it would if it read them: the windowed layers hold their window
    only.

    Args:
        cache: of any length.
        n_tokens: to add.
        chunk: tokens for which pages are taken at a time.
        blocks: where the numbers come from.

    Raises:
        OutOfPages, RequestError: as `RaggedCache.prepare`.
    """
    stop = cache.length + n_tokens
    while cache.length < stop:
        n_new = min(chunk, stop - cache.length)
        cache.prepare(n_new)
        cache.length += n_new
    for table in cache.tables:
        for block in table.blocks:
            for page in block.pages:
                _write(cache.pool, page, blocks)


def _write(pool: PagePool, page: int, blocks: RandomBlocks) -> None:
    """Random numbers all over one page; in int8, such as keys and values around 1 would be."""
    for tensor, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        for layer in tensor[:, page]:
            if scales is None:
                blocks.normal(layer)
            else:
                blocks.integers(layer)
        if scales is not None:
            scales[:, page] = INT8_SCALE
