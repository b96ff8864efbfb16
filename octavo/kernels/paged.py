"""Attention over a paged cache, any mix of prompt chunks and single tokens in one call.

`attention_reference` is the definition. `attention` computes the same: sequences with few new
tokens go together, a bucket of similar lengths in one product; a long chunk goes by itself, a block
of keys gathered at a time, so that memory never grows with the context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from octavo.kernels import blockwise, fused, reference
from octavo.kernels.kv_pages import KVPages

FEW_QUERIES = 16  # new tokens of a sequence that shares a product with others
BUCKET_ELEMENTS = 2**22  # keys' elements gathered at a time; 16 MiB in fp32
PADDING = 1.5  # times its own keys that a sequence in a bucket may be given


def attention_reference(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """Causal grouped-query attention of several sequences over their pages.

    The queries of a sequence are the last of its tokens, whose keys are stored already.

    Args:
        q: [T, n_heads, head_dim], the sequences' queries one after another.
        pages: keys and values; their dtype need not be q's.
        page_table: [B, n_blocks] int64: token p of sequence b is in page page_table[b, p //
            page_size]. Only entries that a query can see are looked at.
        query_lens: [B], new tokens of each sequence, or 0; sums to T.
        kv_lens: [B], all tokens of each sequence.
        window: tokens, or None for full attention.

    Returns:
        [T, n_heads, head_dim] in q's dtype.
    """
    outputs = []
    for row, queries, n_keys in zip(page_table, q.split(list(query_lens)), kv_lens, strict=True):
        first = _first_block(len(queries), n_keys, window, pages.page_size) * pages.page_size
        outputs.append(reference.attention(queries, *pages.tokens(row, first, n_keys), window))
    return torch.cat(outputs)


def attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """As `attention_reference`, same arguments; memory bounded by the bucket and the block."""
    page_size = pages.page_size
    page_elements = pages.keys[0].numel()
    out = torch.empty_like(q)
    few: list[_Span] = []
    start = 0
    for index, (n_queries, n_keys) in enumerate(zip(query_lens, kv_lens, strict=True)):
        if n_queries == 0:
            continue
        first = _first_block(n_queries, n_keys, window, page_size)
        n_blocks = -(-n_keys // page_size) - first
        if n_queries <= FEW_QUERIES and n_blocks * page_elements <= BUCKET_ELEMENTS:
            few.append(_Span(index, start, n_queries, n_keys, first, n_blocks))
        else:
            span = slice(start, start + n_queries)
            out[span] = _attend_alone(q[span], pages, page_table[index], n_keys, window)
        start += n_queries
    for bucket in _buckets(few, page_elements):
        _attend_together(q, pages, page_table, bucket, window, out)
    return out


@dataclass(frozen=True)
class _Span:
    """One sequence of a bucket: its queries q[start : start + n_queries], and its blocks."""

    index: int
    start: int
    n_queries: int
    n_keys: int
    first_block: int
    n_blocks: int


def _first_block(n_queries: int, n_keys: int, window: int | None, page_size: int) -> int:
    """The first block that any of the queries sees."""
    return 0 if window is None else max(0, n_keys - n_queries - window + 1) // page_size


def _attend_alone(
    q: Tensor, pages: KVPages, row: Tensor, n_keys: int, window: int | None
) -> Tensor:
    """One sequence, whose keys are gathered at once if they are few, else a block at a time."""
    first = _first_block(len(q), n_keys, window, pages.page_size) * pages.page_size
    n_seen, n_kv_heads = n_keys - first, pages.keys.shape[1]
    elements = n_seen * n_kv_heads * pages.keys.shape[3]
    if len(q) * n_seen <= fused.MASK_ELEMENTS and elements <= BUCKET_ELEMENTS:
        return fused.attention(q, *pages.tokens(row, first, n_keys), window)
    return blockwise.attend(q, partial(pages.tokens, row), n_keys, window, n_kv_heads)


def _buckets(spans: list[_Span], page_elements: int) -> list[list[_Span]]:
    """Sequences of similar length together, in bounded memory."""
    buckets: list[list[_Span]] = []
    # Longest first: a bucket is as wide as its first member.
    for span in sorted(spans, key=lambda span: -span.n_blocks):
        if buckets:
            bucket = buckets[-1]
            width = bucket[0].n_blocks
            fits = (len(bucket) + 1) * width * page_elements <= BUCKET_ELEMENTS
            if fits and width <= PADDING * span.n_blocks + 4:
                bucket.append(span)
                continue
        buckets.append([span])
    return buckets


def _attend_together(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    bucket: list[_Span],
    window: int | None,
    out: Tensor,
) -> None:
    """Padded to the longest of the bucket, in fp32; writes the bucket's rows of `out`."""
    _, n_kv_heads, page_size, head_dim = pages.keys.shape
    device = q.device
    n_queries = max(span.n_queries for span in bucket)
    columns = torch.tensor(
        [[s.index, s.start, s.n_queries, s.n_keys, s.first_block, s.n_blocks] for s in bucket],
        device=device,
    )
    index, start, own_queries, own_keys, first, own_blocks = columns.t()[..., None].unbind()
    # A shorter sequence reads its last block again, and its last query; both are masked or dropped.
    blocks = torch.arange(bucket[0].n_blocks, device=device).minimum(own_blocks - 1) + first
    rows = torch.arange(n_queries, device=device).minimum(own_queries - 1) + start  # [B, n_queries]
    query_positions = (rows - start + own_keys - own_queries)[..., None]  # [B, n_queries, 1]
    key_positions = (
        torch.arange(bucket[0].n_blocks * page_size, device=device) + first * page_size
    )[:, None]  # [B, 1, L]
    hidden = key_positions > query_positions
    if window is not None:
        hidden |= key_positions <= query_positions - window
    # Heads that share keys become rows of one product: [B, n_kv_heads, n_queries * group, D].
    group = q.shape[1] // n_kv_heads
    queries = q[rows].float().mul_(1.0 / math.sqrt(head_dim))
    queries = queries.view(len(bucket), n_queries, n_kv_heads, group, head_dim)
    queries = queries.permute(0, 2, 1, 3, 4).flatten(2, 3)
    k, v = (
        each.transpose(1, 2).flatten(2, 3).float()
        for each in pages.gather(page_table[index, blocks])
    )  # [B, n_kv_heads, L, D]
    scores = queries @ k.transpose(2, 3)
    hidden = hidden[:, None].repeat_interleave(group, dim=2)  # [B, 1, n_queries * group, L]
    attended = scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ v
    attended = attended.view(len(bucket), n_kv_heads, n_queries, group, head_dim)
    out[rows] = attended.permute(0, 2, 1, 3, 4).flatten(2, 3).to(q.dtype)
