"""Attention in blocks with an online softmax: `reference.attention` in bounded memory.

Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1. A block of keys that no query
of the block can see is never visited, so a windowed layer's work does not grow with the context.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUERY_BLOCK = 256  # queries a block; rows are this times the group
KEY_BLOCK = 1024  # keys a block


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """As `octavo.kernels.reference.attention`, same arguments; extra memory O(block), not O(T)."""
    n_queries, n_heads, head_dim = q.shape
    n_keys, n_kv_heads, _ = k.shape
    group = n_heads // n_kv_heads
    first_position = n_keys - n_queries  # of query 0, counted in keys
    # The heads that share keys become rows of one product: [n_kv_heads, T_q, group, head_dim].
    folded = q.view(n_queries, n_kv_heads, group, head_dim).transpose(0, 1)
    out = torch.empty_like(q)
    out_folded = out.view(n_queries, n_kv_heads, group, head_dim).transpose(0, 1)
    for start in range(0, n_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n_queries)
        rows = folded[:, start:stop].reshape(n_kv_heads, -1, head_dim).float()
        low = 0 if window is None else max(0, first_position + start - window + 1)
        block = _attend_block(
            rows * (1.0 / math.sqrt(head_dim)),
            k[low : first_position + stop],
            v[low : first_position + stop],
            group=group,
            position=first_position + start - low,
            window=window,
        )
        out_folded[:, start:stop] = block.view(n_kv_heads, stop - start, group, head_dim)
    return out


def _attend_block(
    rows: Tensor, k: Tensor, v: Tensor, *, group: int, position: int, window: int | None
) -> Tensor:
    """One block of queries over the keys it can see.

    Args:
        rows: [n_kv_heads, n_queries * group, head_dim] fp32, scaled; row r is query r // group.
        k, v: [n_keys, n_kv_heads, head_dim].
        group: query heads a key head.
        position: index in `k` of the first query's own key.
        window: tokens, or None.

    Returns:
        [n_kv_heads, n_queries * group, head_dim] fp32.
    """
    n_rows = rows.shape[1]
    n_queries = n_rows // group
    maximum = rows.new_full((rows.shape[0], n_rows, 1), float("-inf"))
    total = torch.zeros_like(maximum)
    accumulated = torch.zeros_like(rows)
    query_positions = torch.arange(n_rows, device=rows.device) // group + position
    for low in range(0, k.shape[0], KEY_BLOCK):
        high = min(low + KEY_BLOCK, k.shape[0])
        keys = k[low:high].transpose(0, 1).float()  # [n_kv_heads, keys, head_dim]
        values = v[low:high].transpose(0, 1).float()
        scores = rows @ keys.transpose(1, 2)  # [n_kv_heads, rows, keys]
        # Only blocks that the diagonal or the window's edge crosses need a mask.
        crosses_diagonal = high - 1 > position
        crosses_window = window is not None and position + n_queries - 1 - low >= window
        if crosses_diagonal or crosses_window:
            behind = query_positions[:, None] - torch.arange(low, high, device=rows.device)
            hidden = behind < 0
            if window is not None:
                hidden |= behind >= window
            scores.masked_fill_(hidden, float("-inf"))
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        # A row may see no key of this block yet; exp(-inf - -inf) must be 0, not NaN.
        safe = torch.where(new_maximum == float("-inf"), 0.0, new_maximum)
        probabilities = torch.exp(scores - safe)
        correction = torch.exp(maximum - safe)
        total = total * correction + probabilities.sum(-1, keepdim=True)
        accumulated = accumulated * correction + probabilities @ values
        maximum = new_maximum
    return accumulated / total
