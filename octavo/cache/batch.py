"""What one forward pass needs to know of its sequences' pages, as tensors, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.cache.pool import PagePool
from octavo.cache.ragged import RaggedCache
from octavo.device import to_device
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


class PassPages:
    """The pages of one forward pass.

    Args:
        pool: where they are.
        query_lens: [B], new tokens of each sequence.
        kv_lens: [B], tokens of each once the new ones are stored.
        tables: by kind of layer, page tables [rows, B, n_blocks] and slots [rows, T], on the pool's
            device.
    """

    def __init__(
        self,
        pool: PagePool,
        query_lens: Lens,
        kv_lens: Lens,
        tables: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.pool = pool
        self.query_lens = query_lens
        self.kv_lens = kv_lens
        self._tables = tables

    def layer(self, index: int) -> LayerPages:
        """What layer `index` reads and writes."""
        place = self.pool.layout.places[index]
        page_table, slots = self._tables[place.kind]
        return LayerPages(self.pool.layer(place.slot), page_table[place.row], slots[place.row])


class PagedBatch(PassPages):
    """The pages of a pass to which sequences bring any number of tokens each.

    Args:
        caches: [B], all of one pool. They take the pages that the pass needs.
        query_lens: [B], new tokens of each.

    Attributes:
        positions: [T] int64 on the CPU, of each new token in its sequence.

    Raises:
        RequestError: more tokens than fit, or caches of several pools.
    """

    def __init__(self, caches: Sequence[RaggedCache], query_lens: Sequence[int]) -> None:
        pool = caches[0].pool
        if any(cache.pool is not pool for cache in caches):
            raise RequestError("the caches of one pass must share a pool of pages")
        kv_lens = [cache.length + n for cache, n in zip(caches, query_lens, strict=True)]
        for cache, n in zip(caches, query_lens, strict=True):
            cache.prepare(n)
        tables: list[tuple[Tensor, Tensor]] = []
        super().__init__(pool, Lens(query_lens), Lens(kv_lens), tables)
        self.caches = caches
        owners, self.positions = new_tokens(query_lens, kv_lens)
        device = pool.keys.device
        for kind, rows in enumerate(pool.layout.rows):
            n_blocks = max(cache.tables[kind].stop for cache in caches)
            page_table = torch.zeros(rows, len(caches), n_blocks, dtype=torch.int64)
            fill_table(page_table, caches, kind)
            slots = slot_mapping(page_table, owners, self.positions, pool.layout.page_size)
            tables.append((to_device(page_table, device), to_device(slots, device)))

    def commit(self) -> None:
        """The new tokens are stored: move the caches on."""
        for cache, n in zip(self.caches, self.query_lens, strict=True):
            cache.length += n


def new_tokens(query_lens: Sequence[int], kv_lens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of each new token its sequence, and its position there: [T] int64 each, on the CPU.

    Args:
        query_lens: [B], new tokens of each sequence.
        kv_lens: [B], tokens of each once the new ones are stored.
    """
    # By way of lists: for a few tokens PyTorch's own ways, of several steps, take longer.
    lens = list(zip(query_lens, kv_lens, strict=True))
    owners = torch.tensor([i for i, (n, _) in enumerate(lens) for _ in range(n)])
    return owners, torch.tensor([i for n, stop in lens for i in range(stop - n, stop)])


def slot_mapping(page_table: Tensor, owners: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Where new tokens go, page · page_size + offset: [rows, T] int64.

    Args:
        page_table: [rows, B, n_blocks] on the CPU.
        owners, positions: [T], from `new_tokens`.
        page_size: tokens of a page.
    """
    blocks, offsets = np.divmod(positions.numpy(), page_size)
    pages = page_table.numpy()[:, owners.numpy(), blocks]
    return torch.from_numpy(np.ascontiguousarray(pages * page_size + offsets))


def fill_table(page_table: Tensor, caches: Sequence[RaggedCache], kind: int) -> None:
    """Write the pages that caches hold in the layers of a kind into a table [rows, B, n_blocks].

    It may have more rows of sequences, and be wider; the rest is left as it is.
    """
    to = page_table.numpy()  # which is quicker than PyTorch with a few numbers
    n_blocks = to.shape[2]
    for i, cache in enumerate(caches):
        table = cache.tables[kind]
        # Of guesses that were not right a cache may hold a page beyond a table for its length.
        first, stop = table.first, min(table.stop, n_blocks)
        to[:, i, first:stop] = table.ids[:, first:stop]
