"""All pages of an engine: their memory, who holds them, and which may be taken again."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

from octavo.cache.layout import CacheLayout
from octavo.cache.prefix import PrefixCache
from octavo.errors import RequestError
from octavo.kernels.cpu import memory
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages


class OutOfPages(RequestError):
    """Fewer pages are free than were asked for."""


@dataclass(eq=False, slots=True)
class Block:
    """The pages of page_size neighbouring tokens in the layers of one kind.

    Attributes:
        kind: of layer, an index into `CacheLayout.windows`.
        pages: one for each of the kind's rows.
        references: sequences that hold it.
        depth: which block of its sequence, counted from 0.
        digest: of its tokens and all before them, while the prefix cache knows it; else None.
        last_used: when it was last given back, in the pool's own time.
        was_hit: whether the prefix cache has ever given it to another sequence.
        passed: whether a window had passed it when it was last given back.
    """

    kind: int
    pages: tuple[int, ...]
    depth: int
    references: int = 1
    digest: bytes | None = None
    last_used: int = 0
    was_hit: bool = False
    passed: bool = False


class PagePool:
    """A fixed number of pages, counted by who holds them.

    A page is held by sequences, or cached (held by none, but its contents are known to the prefix
    cache), or free. Cached pages are taken when there are no free ones.

    Attributes:
        keys, values: [layers_per_page, n_pages + 1, n_kv_heads, page_size, head_dim]. On a CPU a
            page takes no memory before it is first written.
        key_scales, value_scales: [layers_per_page, n_pages + 1, n_kv_heads, page_size] bf16 where
            keys and values are int8; else None.
        spare_page: the last one, which is never handed out: what rows that only fill up a batch
            store goes there.

    Args:
        layout: the shape.
        n_pages: how many.
        device: where.
        enable_prefix_caching: whether contents are remembered after their sequence has gone.
    """

    def __init__(
        self,
        layout: CacheLayout,
        n_pages: int,
        device: torch.device | str = "cpu",
        enable_prefix_caching: bool = True,
    ) -> None:
        self.layout = layout
        self.n_pages = n_pages
        self.spare_page = n_pages
        self.prefix = PrefixCache(layout, enabled=enable_prefix_caching)
        device = torch.device(device)
        shape = (layout.layers_per_page, n_pages + 1, layout.n_kv_heads, layout.page_size)
        self.keys = _zeros((*shape, layout.head_dim), layout.dtype, device)
        self.values = _zeros((*shape, layout.head_dim), layout.dtype, device)
        self.key_scales = _zeros(shape, SCALE_DTYPE, device) if layout.scale_bytes else None
        self.value_scales = _zeros(shape, SCALE_DTYPE, device) if layout.scale_bytes else None
        self._layers = [self._layer(slot) for slot in range(layout.layers_per_page)]
        self._free: list[int] = []  # a heap
        self._n_touched = 0  # pages from here on have never been used
        self._clock = 0

    @property
    def n_available(self) -> int:
        """Pages that nobody holds."""
        return self.n_pages - self._n_touched + len(self._free) + self.prefix.n_unheld_pages

    @property
    def n_held(self) -> int:
        """Pages that sequences hold."""
        return self.n_pages - self.n_available

    def allocate(self, kind: int, first: int, n: int) -> list[Block]:
        """Neighbouring blocks of whatever contents.

        A row's pages are the next free ones in the order of memory: a sequence is read from one end
        to the other, and memory is quickest to give what lies one after another.

        Args:
            kind: of layer.
            first: the first block's depth.
            n: how many blocks.

        Raises:
            OutOfPages: too few are left. Whoever needs several kinds asks `n_available` first.
        """
        rows = self.layout.rows[kind]
        while len(self._free) < rows * n:
            if self._n_touched < self.n_pages:
                heappush(self._free, self._n_touched)
                self._n_touched += 1
            elif (evicted := self.prefix.evict()) is not None:
                self._give_back(evicted)
            else:
                raise OutOfPages(f"KV cache: all {self.n_pages} pages are in use")
        pages = [heappop(self._free) for _ in range(rows * n)]
        return [Block(kind, tuple(pages[i::n]), first + i) for i in range(n)]

    def retain(self, block: Block) -> None:
        """One more sequence holds this block."""
        if block.references == 0:
            self.prefix.take(block)
        block.references += 1

    def release(self, blocks: list[Block], *, passed: bool = False) -> None:
        """A sequence lets go of blocks, all at one time.

        Args:
            passed: whether the window has passed them, so that they only serve hits shorter than
                the sequence.
        """
        self._clock += 1
        for block in blocks:
            assert block.references > 0, "a block was released twice"
            block.references -= 1
            if block.references:
                continue
            block.last_used, block.passed = self._clock, passed
            if block.digest is None:
                self._give_back(block)
            else:
                self.prefix.keep(block)

    def _give_back(self, block: Block) -> None:
        for page in block.pages:
            heappush(self._free, page)

    def layer(self, slot: int) -> KVPages:
        """The pages of the layers at this slot, one of layers_per_page."""
        return self._layers[slot]

    def _layer(self, slot: int) -> KVPages:
        if self.key_scales is None or self.value_scales is None:
            return KVPages(self.keys[slot], self.values[slot])
        return KVPages(
            self.keys[slot], self.values[slot], self.key_scales[slot], self.value_scales[slot]
        )

    def copy(self, source: Block, target: Block) -> None:
        """The contents of one block, written into another of its kind."""
        for tensor in (self.keys, self.values, self.key_scales, self.value_scales):
            if tensor is not None:
                # A page at a time: a list of them would be copied to the device first.
                for page, copied in zip(target.pages, source.pages, strict=True):
                    tensor[:, page] = tensor[:, copied]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, the system hands out page by page as they are written.

    Zeros and not whatever the memory held: a probability of 0 times NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return memory.zeros(shape, dtype)
