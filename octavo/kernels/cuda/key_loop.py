"""The loop over keys that prefill and decode share: one key head, a block of rows.

The query heads that share a key head are rows of one product: row r is head r % GROUP of query
r // GROUP. Scores are logarithms to the base 2, since that is the exponential GPUs have.

Of int8 pages, the product with the keys is one of integers, at twice the rate of bf16 on most GPUs:
queries are quantised with a scale a row. That with the values is not: it sums over tokens, and the
integer products of a GPU want the terms of a sum side by side, where a token's values lie side by
side. Integers up to 127 are exact in bf16, so values are widened, and their scales go to the
weights before these are rounded.
"""

from __future__ import annotations

import typing

import triton
import triton.language as tl

from octavo.kernels.cuda.launch import INTERPRETED

# Kernels' arguments are typing.Any: of an annotation that is one name Triton asks what it is.
_INTERPRETED = tl.constexpr(INTERPRETED)
# What a row's highest score begins with; of two infinities the difference would be NaN.
LOWEST = tl.constexpr(-3e38)


@triton.jit
def rows_of(
    start: typing.Any,
    first: typing.Any,
    n_queries: typing.Any,
    kv_head: typing.Any,
    GROUP: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> typing.Any:
    """The rows of a sequence's queries first…: which queries, where they lie, which there are.

    Args:
        start: of the sequence, among all tokens.

    Returns:
        [BLOCK_ROWS]; offsets into q and out, [BLOCK_ROWS, HEAD_DIM] int64; [BLOCK_ROWS, 1] bool.
    """
    row = tl.arange(0, BLOCK_ROWS)
    query = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    place = ((start + query).to(tl.int64) * (N_KV_HEADS * GROUP) + head) * HEAD_DIM
    present = (row < BLOCK_ROWS // GROUP * GROUP) & (query < n_queries)
    return query, place[:, None] + tl.arange(0, HEAD_DIM)[None, :], present[:, None]


@triton.jit
def first_seen_by(position: typing.Any, window: typing.Any) -> typing.Any:
    """The first key that the query there sees."""
    return tl.maximum(position - window + 1, 0) if window is not None else position * 0


@triton.jit
def attend(
    q: typing.Any,
    positions: typing.Any,
    first_position: typing.Any,
    last_position: typing.Any,
    begin: typing.Any,
    end: typing.Any,
    pages: typing.Any,
    table: typing.Any,
    kv_head: typing.Any,
    scale: typing.Any,
    window: typing.Any,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> typing.Any:
    """What the keys begin…end-1 give the rows.

    Args:
        q: [BLOCK_ROWS, HEAD_DIM], 0 in rows of no query.
        positions: [BLOCK_ROWS], of the rows' queries in the sequence.
        first_position, last_position: of the queries there are.
        begin, end: multiples of BLOCK_KEYS, but that end may be last_position + 1.
        pages: pointers, as in KVPages.
        table: pointer to the sequence's row of the page table.
        scale: of the scores, log2(e) in it.
        OPERAND: what floating-point products are of.

    Returns:
        [BLOCK_ROWS, HEAD_DIM] fp32, sums of values by their weights; [BLOCK_ROWS] the greatest
        score, to which the weights are relative; [BLOCK_ROWS] the weights' total, 0 of a row that
        sees none of the keys.
    """
    keys, values, key_scales, value_scales = pages
    row_scales = tl.full([BLOCK_ROWS], scale, tl.float32)
    if key_scales is None:
        q = _as(OPERAND, q)
    else:
        q = q.to(tl.float32)
        # A maximum may pass over a NaN; 0 · q does not.
        largest = tl.max(tl.abs(q), 1) + tl.sum(0.0 * q, 1)
        # Of so little nothing is left beside other numbers; a scale of 0 would make NaN of -inf.
        q_scales = tl.where(largest < 1e-30, 1.0, largest / 127.0)
        q = _round_to_int8(q / q_scales[:, None])
        row_scales *= q_scales
    sums = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
    highest = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)

    # In blocks: all queries see inner…outer-1; of those before and after, some see some.
    first_seen = first_seen_by(first_position, window)
    first, last = begin // BLOCK_KEYS, tl.cdiv(end, BLOCK_KEYS)
    inner = tl.cdiv(first_seen_by(last_position, window), BLOCK_KEYS)
    inner = tl.minimum(tl.maximum(inner, first), last)
    outer = tl.maximum(first_position + 1, 0) // BLOCK_KEYS
    outer = tl.minimum(tl.maximum(outer, inner), last)

    column = tl.arange(0, HEAD_DIM)
    for part in tl.static_range(1 if window is None else 0, 3):
        low = first if part == 0 else inner if part == 1 else outer
        high = inner if part == 0 else outer if part == 1 else last
        for block in range(low, high):
            # The compiler sees that a page's keys and scales lie in order, and reads them in wide
            # loads ahead of their use, as long as nothing here depends on a single key.
            key = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            index = key // PAGE_SIZE
            if part != 1:
                # In place of a page that none sees, which may be any number, one that is.
                index = tl.maximum(index, first_seen // PAGE_SIZE)
                index = tl.minimum(index, (end - 1) // PAGE_SIZE)
            page = tl.load(table + index)  # int64, and so what is made of it
            slot = (page * N_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE
            place = slot[:, None] * HEAD_DIM + column[None, :]
            k = tl.load(keys + place)
            seen = (key >= first_seen) & (key < end)  # all of part 1
            if part == 1 or value_scales is not None:
                v = tl.load(values + place)
            else:
                # A weight of 0 does not undo what an unseen token may have left there: 0 · NaN.
                v = tl.load(values + place, mask=seen[:, None], other=0.0)
            if key_scales is None:
                scores = _product(q, tl.trans(_as(OPERAND, k)), None)
            else:
                scores = tl.dot(q, tl.trans(k)).to(tl.float32)
                scores *= tl.load(key_scales + slot).to(tl.float32)[None, :]
            if part != 1:
                visible = key[None, :] <= positions[:, None]
                if window is not None:
                    visible &= key[None, :] > positions[:, None] - window
                scores = tl.where(visible, scores, float("-inf"))

            # Rows are scaled in the exponent, where a product and a difference are one instruction.
            higher = tl.maximum(highest, tl.max(scores, 1) * row_scales)
            weights = tl.exp2(scores * row_scales[:, None] - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weights, 1)
            if value_scales is not None:
                v_scales = tl.load(value_scales + slot).to(tl.float32)
                if part != 1:
                    v_scales = tl.where(seen, v_scales, 0.0)
                weights *= v_scales[None, :]
            sums = _product(_as(OPERAND, weights), _as(OPERAND, v), sums * shrink[:, None])
            highest = higher
    return sums, highest, total


@triton.jit
def _as(OPERAND: tl.constexpr, x: typing.Any) -> typing.Any:
    """x in that dtype."""
    if _INTERPRETED:  # which makes bf16 of fp32 alone (and cuts bits off, where a GPU rounds)
        x = x.to(tl.float32)
    return x.to(OPERAND)


@triton.jit
def _product(a: typing.Any, b: typing.Any, sums: typing.Any) -> typing.Any:
    """sums + a b in fp32, to full precision where a and b are fp32."""
    if _INTERPRETED:  # which cannot multiply bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _round_to_int8(x: typing.Any) -> typing.Any:
    """To the nearest, halves away from zero; a conversion by itself cuts the fraction off."""
    return (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int8)
