"""A cache that holds a long context without having computed it."""

from __future__ import annotations

from octavo.bench.random_model import RandomBlocks
from octavo.cache import PagePool, RaggedCache


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
    """Random numbers all over one page."""
    for tensor in (pool.keys, pool.values):
        for layer in tensor[:, page]:
            blocks.normal(layer)
