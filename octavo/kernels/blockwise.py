"""Attention in blocks with an online softmax: `reference.attention` in bounded memory.

Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1. A block of keys that no query
of the block can see is never visited, so a windowed layer's work does not grow with the context.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

QUERY_BLOCK = 256  # queries a block; rows are this times the group
KEY_BLOCK = 1024  # keys a block


Tokens = Callable[[int, int], tuple[Tensor, Tensor]]


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """As `octavo.kernels.reference.attention`, same arguments; extra memory O(block), not O(T)."""
    return attend(q, lambda low, high: (k[low:high], v[low:high]), k.shape[0], window, k.shape[1])


def attend(q: Tensor, tokens: Tokens, n_keys: int, window: int | None, n_kv_heads: int) -> Tensor:
    """The same, over keys and values that are fetched a block at a time.

    Args:
        q: [T_q, n_heads, head_dim].
        tokens: gives keys and values of the tokens low…high-1, [high - low, n_kv_heads, head_dim].
        n_keys: T_k.
        window: tokens, or None for full attention.
        n_kv_heads: of the keys.
    """
    n_queries, n_heads, head_dim = q.shape
    group = n_heads // n_kv_heads
    first_position = n_keys - n_queries  # of query 0, counted in keys
    # The heads that share keys become rows of one product: [n_kv_heads, T_q, group, head_dim].
    folded = q.view(n_queries, n_kv_heads, group, head_dim).transpose(0, 1)
    out = torch.empty_like(q)
    out_folded = out.view(n_queries, n_kv_heads, group, head_dim).transpose(0, 1)
    for start in range(0, n_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n_queries)
        rows = folded[:, start:stop].reshape(n_kv_heads, -1, head_dim).float()
        position = first_position + start
        block = _attend_block(
            rows * (1.0 / math.sqrt(head_dim)),
            tokens,
            range(0 if window is None else max(0, position - window + 1), first_position + stop),
            group=group,
            position=position,
            window=window,
        )
        out_folded[:, start:stop] = block.view(n_kv_heads, stop - start, group, head_dim)
    return out


def _attend_block(
    rows: Tensor,
    tokens: Tokens,
    seen: range,
    *,
    group: int,
    position: int,
    window: int | None,
) -> Tensor:
    """One block of queries over the keys it can see.

    Args:
        rows: [n_kv_heads, n_queries * group, head_dim] fp32, scaled; row r is query r // group.
        tokens: as in `attend`.
        seen: the tokens that any of the queries sees.
        group: query heads a key head.
        position: of the first query.
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
    for low in range(seen.start, seen.stop, KEY_BLOCK):
        high = min(low + KEY_BLOCK, seen.stop)
        # [n_kv_heads, keys, head_dim]
        keys, values = (each.transpose(0, 1).float() for each in tokens(low, high))
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
