"""New tokens on their way into the cache: queries and keys turned, keys and values stored."""

from __future__ import annotations

from torch import Tensor

from octavo.kernels.kv_pages import KVPages, quantize_kv
from octavo.kernels.reference import apply_rotary


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pages: KVPages, slot_mapping: Tensor
) -> Tensor:
    """Turn queries and keys by their tokens' angles, and store keys and values in their pages.

    Args:
        q: [T, n_heads, head_dim], any float dtype.
        k, v: [T, n_kv_heads, head_dim], in q's dtype. Keys are rounded to it once turned.
        cos, sin: [T, head_dim/2] fp32, as in `reference.apply_rotary`.
        pages: changed in place, where slot_mapping says and nowhere else; of any dtype.
        slot_mapping: [T] int64, page · page_size + offset of each token; no two the same.

    Returns:
        The turned queries, [T, n_heads, head_dim] in q's dtype.
    """
    append_kv(apply_rotary(k, cos, sin), v, pages, slot_mapping)
    return apply_rotary(q, cos, sin)


def append_kv(k: Tensor, v: Tensor, pages: KVPages, slot_mapping: Tensor) -> None:
    """Store new keys and values in their pages; arguments as in `rotary_append`."""
    page, offset = slot_mapping // pages.page_size, slot_mapping % pages.page_size
    for new, stored, scales in (
        (k, pages.keys, pages.key_scales),
        (v, pages.values, pages.value_scales),
    ):
        if scales is None:
            stored[page, :, offset] = new.to(stored.dtype)
        else:
            stored[page, :, offset], scales[page, :, offset] = quantize_kv(new)
