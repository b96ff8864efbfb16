"""What one forward pass needs to know of its sequences' pages, as tensors, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from octavo.cache.ragged import RaggedCache
from octavo.errors import RequestError
from octavo.kernels.kv_pages import KVPages
from octavo.kernels.lens import Lens


@dataclass(frozen=True)
class LayerPages:
    """One layer's part of the cache, as the kernels take it.

    Attributes:
        pages: keys and values.
        page_table: [B, n_blocks] int64, each sequence's pages in order; entries that no query of
            the pass can see are arbitrary.
        slot_mapping: [T] int64, where each new token goes: page · page_size + offset.
    """

    pages: KVPages
    page_table: Tensor
    slot_mapping: Tensor


class PagedBatch:
    """The sequences of one forward pass.

    Args:
        caches: [B], all of one pool. They take the pages that the pass needs.
        query_lens: [B], new tokens of each.

    Attributes:
        query_lens: the same.
        kv_lens: [B], tokens of each once the new ones are stored.

    Raises:
        RequestError: more tokens than fit, or caches of several pools.
    """

    def __init__(self, caches: Sequence[RaggedCache], query_lens: Sequence[int]) -> None:
        self.caches = caches
        self.pool = caches[0].pool
        self.query_lens = Lens(query_lens)
        self.kv_lens = Lens(
            cache.length + n for cache, n in zip(caches, self.query_lens, strict=True)
        )
        if any(cache.pool is not self.pool for cache in caches):
            raise RequestError("the caches of one pass must share a pool of pages")
        for cache, n in zip(caches, query_lens, strict=True):
            cache.prepare(n)
        device = self.pool.keys.device
        self._tables: list[tuple[Tensor, Tensor]] = []  # by kind: [rows, B, n_blocks], [rows, T]
        for kind, rows in enumerate(self.pool.layout.rows):
            tables = [cache.tables[kind] for cache in caches]
            n_blocks = max(table.stop for table in tables)
            page_table = torch.zeros(rows, len(caches), n_blocks, dtype=torch.int64)
            for i, table in enumerate(tables):
                page_table[:, i, table.first : table.stop] = table.ids[:, table.first : table.stop]
            page_size = self.pool.layout.page_size
            blocks, offsets = self.positions // page_size, self.positions % page_size
            slots = page_table[:, self.owners, blocks] * page_size + offsets
            self._tables.append((page_table.to(device), slots.to(device)))

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64 on the CPU: of each new token in its sequence."""
        starts = torch.tensor(self.kv_lens) - torch.tensor(self.query_lens)
        lens = torch.tensor(self.query_lens)
        ends = lens.cumsum(0)
        return torch.arange(int(ends[-1])) - (ends - lens - starts).repeat_interleave(lens)

    @cached_property
    def owners(self) -> Tensor:
        """[T] int64 on the CPU: which sequence each new token is of."""
        lens = torch.tensor(self.query_lens)
        return torch.arange(len(lens)).repeat_interleave(lens)

    def layer(self, index: int) -> LayerPages:
        """What layer `index` reads and writes."""
        place = self.pool.layout.places[index]
        page_table, slots = self._tables[place.kind]
        return LayerPages(self.pool.layer(place.slot), page_table[place.row], slots[place.row])

    def commit(self) -> None:
        """The new tokens are stored: move the caches on."""
        for cache, n in zip(self.caches, self.query_lens, strict=True):
            cache.length += n
