"""The ragged KV cache of one sequence: full layers keep all pages, windowed layers the last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from octavo.cache.pool import Block, OutOfPages, PagePool
from octavo.cache.prefix import Hit
from octavo.errors import RequestError


class PageTable:
    """The pages of one sequence in the layers of one kind.

    Attributes:
        first: the first block still held; those before it were given back.
        blocks: the blocks from there on.
        ids: [rows, capacity] int64, the page of every block counted from 0. Entries before `first`
            are of the past, and those past the last block of the future. An array, since a step
            reads those of all its sequences, each of them few.
    """

    def __init__(self, n_rows: int) -> None:
        self.first = 0
        self.blocks: list[Block] = []
        self.ids = np.zeros((n_rows, 16), np.int64)

    @property
    def stop(self) -> int:
        """The block after the last."""
        return self.first + len(self.blocks)

    def extend(self, blocks: Sequence[Block]) -> None:
        """Hold the blocks that follow the last."""
        if not blocks:
            return
        start, stop = self.stop, self.stop + len(blocks)
        if stop > self.ids.shape[1]:
            self.ids = np.hstack((self.ids, np.zeros((len(self.ids), stop), np.int64)))
        # At once: a prompt may take over thousands of blocks.
        self.ids[:, start:stop] = np.array([block.pages for block in blocks]).T
        self.blocks.extend(blocks)


class RaggedCache:
    """One sequence's keys and values: a page table for each kind of layer.

    Attributes:
        pool: where the pages come from.
        capacity: the most tokens that it may hold, or None.
        length: tokens stored; `Transformer` moves it on after each pass. Moving it back forgets
            the last tokens.
        tables: one for each kind of layer.
    """

    def __init__(self, pool: PagePool, capacity: int | None = None) -> None:
        self.pool = pool
        self.capacity = capacity
        self.length = 0
        self.tables = [PageTable(rows) for rows in pool.layout.rows]
        self._see_tables()

    @property
    def n_pages(self) -> int:
        """Pages that this sequence holds, shared ones included."""
        rows = self.pool.layout.rows
        return sum(n * len(table.blocks) for n, table in zip(rows, self.tables, strict=True))

    def pages_to_take(self, n_new: int) -> int:
        """How many more pages `prepare` would take from the pool for `n_new` tokens."""
        if self._has_room(n_new):
            return 0
        layout = self.pool.layout
        stop = layout.n_blocks(self.length + n_new)
        total = 0
        for kind, table in enumerate(self.tables):
            total += layout.rows[kind] * max(0, stop - table.stop)
            if n_passed := self._n_passed(kind, table):
                passed = table.blocks[:n_passed]
                total -= sum(len(block.pages) for block in passed if block.references == 1)
        return total

    def prepare(self, n_new: int) -> None:
        """Give back what the windows have passed, and take pages for `n_new` more tokens.

        Raises:
            OutOfPages: the pool has too few; nothing was taken.
            RequestError: more tokens than the capacity.
        """
        if self.capacity is not None and self.length + n_new > self.capacity:
            raise RequestError(
                f"KV cache: {self.length} tokens are stored and {n_new} more do not fit "
                f"in its capacity of {self.capacity}"
            )
        if self._has_room(n_new):
            return
        layout, pool = self.pool.layout, self.pool
        needed = self.pages_to_take(n_new)
        if needed > pool.n_available:
            raise OutOfPages(f"KV cache: {needed} more pages, and {pool.n_available} are left")
        for kind, table in enumerate(self.tables):
            if n_passed := self._n_passed(kind, table):
                pool.release(table.blocks[:n_passed], passed=True)
                del table.blocks[:n_passed]
                table.first += n_passed
        stop = layout.n_blocks(self.length + n_new)
        for kind, table in enumerate(self.tables):
            if table.stop < stop:
                table.extend(pool.allocate(kind, table.stop, stop - table.stop))
        self._see_tables()

    def take_over(self, hit: Hit) -> None:
        """Begin with the blocks of a hit; the cache must be empty."""
        for table, (first, blocks) in zip(self.tables, hit.blocks, strict=True):
            table.first = first
            table.ids = np.zeros((len(table.ids), hit.n_blocks + 16), np.int64)
            for block in blocks:
                block.was_hit = True
                self.pool.retain(block)
            table.extend(blocks)
        self.length = hit.n_blocks * self.pool.layout.page_size
        self._see_tables()

    def remember(self, digests: list[bytes], start: int) -> int:
        """Let the prefix cache know the blocks that are full, from block `start` on.

        Args:
            digests: of the sequence's blocks.
            start: the first block that is not known yet.

        Returns:
            The first block that is not full.
        """
        stop = min(self.length // self.pool.layout.page_size, len(digests))
        for table in self.tables:
            for index in range(max(start, table.first), min(stop, table.stop)):
                self.pool.prefix.insert(table.blocks[index - table.first], digests[index])
        return max(start, stop)

    def copy(self) -> RaggedCache:
        """A twin with the same contents: it shares the full blocks, and has its own last one.

        Raises:
            OutOfPages: not even one block is left.
        """
        layout, pool = self.pool.layout, self.pool
        n_full = self.length // layout.page_size
        has_partial = self.length % layout.page_size > 0
        if has_partial and sum(layout.rows) > pool.n_available:
            raise OutOfPages("KV cache: no page is left for a copy")
        twin = RaggedCache(pool, self.capacity)
        twin.length = self.length
        for kind, (table, other) in enumerate(zip(self.tables, twin.tables, strict=True)):
            other.first = table.first
            other.ids = table.ids.copy()
            shared = table.blocks[: max(0, n_full - table.first)]
            for block in shared:
                pool.retain(block)
            other.extend(shared)
            if has_partial:
                [own] = pool.allocate(kind, n_full, 1)
                pool.copy(table.blocks[n_full - table.first], own)
                other.extend([own])
        twin._see_tables()
        return twin

    def free(self) -> None:
        """Give every block back; the cache is empty afterwards."""
        self.pool.release([block for table in self.tables for block in table.blocks])
        self.tables = [PageTable(rows) for rows in self.pool.layout.rows]
        self.length = 0
        self._see_tables()

    def _has_room(self, n_new: int) -> bool:
        """Whether the pages that are held do for more tokens, and none of them is passed yet.

        A sequence is asked so before every token, and few tokens begin a page.
        """
        return self.length + n_new <= self._n_held and self.length < self._first_passing

    def _see_tables(self) -> None:
        """Work out from the tables, which have changed, what `_has_room` asks."""
        layout = self.pool.layout
        self._n_held = min(table.stop for table in self.tables) * layout.page_size
        # The least length at which a window has passed a block: see CacheLayout.first_block.
        self._first_passing = min(
            (table.first + 1) * layout.page_size + window - 1 if window is not None else math.inf
            for table, window in zip(self.tables, layout.windows, strict=True)
        )

    def _n_passed(self, kind: int, table: PageTable) -> int:
        """How many of the table's blocks no token from here on can see."""
        return max(0, self.pool.layout.first_block(kind, self.length) - table.first)
