"""Where keys and values are kept between forward passes: a ragged cache in pages."""

from octavo.cache.batch import (
    LayerPages,
    PagedBatch,
    PassPages,
    fill_table,
    new_tokens,
    slot_mapping,
)
from octavo.cache.layout import KV_DTYPES, CacheLayout, kv_dtype, tokens_of_page
from octavo.cache.pool import OutOfPages, PagePool
from octavo.cache.prefix import block_digests
from octavo.cache.ragged import RaggedCache

__all__ = [
    "KV_DTYPES",
    "CacheLayout",
    "LayerPages",
    "OutOfPages",
    "PagePool",
    "PagedBatch",
    "PassPages",
    "RaggedCache",
    "block_digests",
    "fill_table",
    "kv_dtype",
    "new_tokens",
    "slot_mapping",
    "tokens_of_page",
]
