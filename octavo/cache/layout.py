"""How the layers' keys and values share pages.

A page holds the keys and values of some neighbouring tokens, in several layers of one kind: a kind
is all layers with the same window. Pages of every kind have the same size, so that one pool
serves them all: the layers of a page are as many as divide the layers of each kind. Ministral-8B
has 9 full layers and 27 windowed ones; a page holds 9 layers, and a page's tokens take one page in
the full layers and three in the windowed ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from octavo.config import ModelConfig
from octavo.errors import ConfigError
from octavo.kernels.kv_pages import SCALE_DTYPE

KV_DTYPES = ("auto", "bf16", "int8")
# Of a page's tokens in one element of a head. A page is what a step of decoding takes of a head at
# a time on a CPU (DIRECT_BYTES in native/attention.h): so it reads memory from end to end.
PAGE_BYTES = 64


def kv_dtype(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """What keys and values are kept in: `auto` is the model's dtype, then there are bf16 and int8.

    Raises:
        ConfigError: a name that is none of KV_DTYPES.
    """
    if kv_cache_dtype not in KV_DTYPES:
        raise ConfigError(
            f"kv_cache_dtype: {kv_cache_dtype!r} is not one of {', '.join(KV_DTYPES)}"
        )
    return {"auto": model_dtype, "bf16": torch.bfloat16, "int8": torch.int8}[kv_cache_dtype]


def tokens_of_page(dtype: torch.dtype) -> int:
    """How many tokens' keys and values a page holds, in this dtype: 64 in int8, 32 in bf16."""
    return PAGE_BYTES // dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a layer's keys and values are: in pages of `kind`, those of `row`, at `slot`."""

    kind: int
    row: int
    slot: int


@dataclass(frozen=True)
class CacheLayout:
    """The shape of a cache.

    Attributes:
        windows: the kinds of layer: tokens, or None for full attention.
        rows: of each kind, the pages that page_size tokens take.
        places: of each layer.
        layers_per_page: layers that a page serves.
        n_kv_heads, head_dim: of the model.
        dtype: of keys and values; int8 has a scale for each token and head beside it.
        page_size: tokens.
    """

    windows: tuple[int | None, ...]
    rows: tuple[int, ...]
    places: tuple[Place, ...]
    layers_per_page: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: torch.dtype, page_size: int | None = None
    ) -> CacheLayout:
        """The layout for a model; `dtype` as `kv_dtype` gives it.

        Args:
            page_size: tokens; None is as `tokens_of_page` says.
        """
        windows = [None if w is None or w >= config.max_seq_len else w for w in config.windows]
        kinds = tuple(dict.fromkeys(windows))
        counts = [windows.count(kind) for kind in kinds]
        per_page = gcd(*counts)
        seen = [0] * len(kinds)
        places = []
        for window in windows:
            kind = kinds.index(window)
            places.append(Place(kind, *divmod(seen[kind], per_page)))
            seen[kind] += 1
        return cls(
            windows=kinds,
            rows=tuple(count // per_page for count in counts),
            places=tuple(places),
            layers_per_page=per_page,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            page_size=page_size or tokens_of_page(dtype),
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's keys and values, and of their scales."""
        rows = 2 * self.layers_per_page * self.page_size * self.n_kv_heads
        return rows * (self.head_dim * self.dtype.itemsize + self.scale_bytes)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale of one token's key or value; 0 where it needs none."""
        return SCALE_DTYPE.itemsize if self.dtype == torch.int8 else 0

    def n_blocks(self, n_tokens: int) -> int:
        """Runs of page_size tokens that hold `n_tokens`, the last perhaps in part."""
        return -(-n_tokens // self.page_size)

    def first_block(self, kind: int, position: int) -> int:
        """The first block that the query at `position`, or any after it, still sees."""
        window = self.windows[kind]
        return 0 if window is None else max(0, position - window + 1) // self.page_size

    def pages_needed(self, n_tokens: int, chunk: int) -> int:
        """The most pages that a sequence of `n_tokens` holds at once, read in chunks of `chunk`."""
        total = 0
        for window, rows in zip(self.windows, self.rows, strict=True):
            blocks = self.n_blocks(n_tokens)
            if window is not None:
                # Window and chunk may begin and end within a page.
                blocks = min(blocks, self.n_blocks(window - 1 + chunk) + 1)
            total += rows * blocks
        return total
