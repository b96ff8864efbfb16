"""Attention of prompt chunks: a program has a block of queries and goes over all of their keys.

The blockwise softmax of FlashAttention-2 (Dao 2023), over a ragged batch. Sequence s has query
blocks from starts[s] // BLOCK_QUERIES + s on, which leaves room for its own before the next one's
first, and for one too many at most. So a block finds its sequence without a table from the host,
and there are T // BLOCK_QUERIES + B of them.
"""

from __future__ import annotations

import typing

import torch
import triton
import triton.language as tl

from octavo.kernels.cuda.call import AttentionCall, Blocks
from octavo.kernels.cuda.early_launch import wait_for_previous
from octavo.kernels.cuda.key_loop import attend, first_seen_by, rows_of
from octavo.kernels.cuda.launch import INTERPRETED
from octavo.kernels.cuda.tiling import Processors, processors

_SEQUENCES = tl.constexpr(128)  # whose first blocks are looked at in one load


def launch(call: AttentionCall, more_than: int, at_most: int) -> None:
    """Attention of the sequences with more new tokens than one and at most as many as the other,
    into their rows of call.out."""
    blocks = block_sizes(call.operand, call.pages.keys.dtype, processors())
    n_sequences = len(call.query_lens)
    n_blocks = len(call.q) // (blocks.rows // call.group) + n_sequences
    _prefill[n_blocks, call.n_kv_heads](
        *call.arguments(), n_sequences, more_than, at_most, **call.constants(blocks)
    )


def block_sizes(operand: tl.dtype, kept: torch.dtype, device: Processors) -> Blocks:
    """By what products are of, what keys and values are kept in, and what registers must hold."""
    # Without tensor cores a product is spelled out, in registers; the interpreter has no registers.
    if operand == tl.float32 and not INTERPRETED:
        return Blocks(rows=16, keys=16, warps=4, stages=3)
    if INTERPRETED:
        return Blocks(rows=128, keys=64, warps=8, stages=3)
    # Products are so quick there that what is done beside them counts, which is less a key in a
    # longer block: bf16 takes 623 instructions a warp for 128 keys, and two times 408 for 64.
    if device.multiply_in_shared_memory:
        return Blocks(rows=128, keys=128, warps=8, stages=3)
    # More would spill: values are in registers before they are multiplied, int8 ones twice.
    if kept == torch.int8:
        return Blocks(rows=64, keys=64, warps=8, stages=3)
    return Blocks(rows=128, keys=32, warps=8, stages=3)


@triton.jit(do_not_specialize=["table_stride", "window", "n_sequences", "more_than", "at_most"])
def _prefill(
    q: typing.Any,
    out: typing.Any,
    pages: typing.Any,
    page_table: typing.Any,
    table_stride: typing.Any,
    starts: typing.Any,
    kv_lens: typing.Any,
    scale: typing.Any,
    window: typing.Any,
    n_sequences: typing.Any,
    more_than: typing.Any,
    at_most: typing.Any,
    GROUP: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    wait_for_previous()
    BLOCK_QUERIES: tl.constexpr = BLOCK_ROWS // GROUP
    # A chunk's last blocks have the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = -1
    for low in range(0, n_sequences, _SEQUENCES):
        index = low + tl.arange(0, _SEQUENCES)
        first_block = tl.load(starts + index, mask=index < n_sequences, other=2**30)
        first_block = first_block // BLOCK_QUERIES + index
        sequence += tl.sum((first_block <= block).to(tl.int32))
    start = tl.load(starts + sequence)
    n_queries = tl.load(starts + sequence + 1) - start
    first = (block - start // BLOCK_QUERIES - sequence) * BLOCK_QUERIES
    if (n_queries <= more_than) | (n_queries > at_most) | (first >= n_queries):
        return

    query, places, present = rows_of(
        start, first, n_queries, kv_head, GROUP, N_KV_HEADS, HEAD_DIM, BLOCK_ROWS
    )
    past = tl.load(kv_lens + sequence) - n_queries
    first_position = past + first
    last_position = past + tl.minimum(first + BLOCK_QUERIES, n_queries) - 1
    sums, _, total = attend(
        tl.load(q + places, mask=present, other=0.0),
        past + query,
        first_position,
        last_position,
        first_seen_by(first_position, window) // BLOCK_KEYS * BLOCK_KEYS,
        last_position + 1,
        pages,
        page_table + sequence * table_stride,
        kv_head,
        scale,
        window,
        N_KV_HEADS,
        HEAD_DIM,
        PAGE_SIZE,
        OPERAND,
        BLOCK_ROWS,
        BLOCK_KEYS,
    )
    # Worked out anew: kept over the loop it takes 20 registers. (Loads within rows_of were the same
    # to the compiler both times, and it kept them.)
    start = tl.load(starts + sequence)
    n_queries = tl.load(starts + sequence + 1) - start
    _, places, present = rows_of(
        start, first, n_queries, kv_head, GROUP, N_KV_HEADS, HEAD_DIM, BLOCK_ROWS
    )
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=present)
