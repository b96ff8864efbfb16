"""Attention of few new tokens a sequence: its keys are cut into runs, for programs of their own.

One token a sequence makes too few programs to fill a GPU, so the keys are split as well
(Flash-Decoding, Dao et al. 2023), and a second kernel puts together what the runs give. How many
runs there are follows from what the host knows of the lengths, which may be bounds of them; where
they begin follows from the lengths, which a captured graph reads on the device.
"""

from __future__ import annotations

import typing
from functools import cache

import torch
import triton
import triton.language as tl

from octavo.kernels.cuda.call import AttentionCall, Blocks
from octavo.kernels.cuda.early_launch import early_launch, wait_for_previous
from octavo.kernels.cuda.key_loop import LOWEST, attend, first_seen_by, rows_of
from octavo.kernels.cuda.launch import INTERPRETED
from octavo.kernels.cuda.tiling import Processors, processors

FEW_QUERIES = 16  # new tokens of a sequence that comes here, at most
MOST_ROWS = {tl.float32: 16}  # of a program: see prefill.block_sizes
PROGRAMS = 4  # a multiprocessor that there should be
SPLIT_KEYS = 128  # a run has at least, by the host's bounds
MOST_SPLITS = 128  # whose sums fit into registers when they are put together
PART_BYTES = 64 * 2**20  # of all runs' sums, at most: there is room for every sequence of the pass


def few_queries(call: AttentionCall) -> int:
    """The most new tokens of a sequence that this takes."""
    return min(FEW_QUERIES, MOST_ROWS.get(call.operand, 128) // call.group)


def launch(call: AttentionCall, at_most: int, n_sequences: int) -> None:
    """Attention of the sequences with 1 to at_most new tokens, into their rows of call.out.

    Args:
        at_most: no more than `few_queries`.
        n_sequences: how many of them there are.
    """
    n_rows = at_most * call.group
    n_seen = max(call.kv_lens)
    if call.window is not None:
        n_seen = min(n_seen, call.window + at_most - 1)
    n_parts = len(call.query_lens) * call.n_kv_heads * n_rows  # of each run
    splits = n_splits(n_sequences * call.n_kv_heads, n_seen, call.q.device)
    while splits > 1 and n_parts * splits * call.q.shape[2] * 4 > PART_BYTES:
        splits //= 2
    blocks = block_sizes(call.operand, n_rows, call.pages.keys.dtype, processors())
    grid = (splits, call.n_kv_heads, len(call.query_lens))
    if splits == 1:
        _decode[grid](*call.arguments(), None, None, n_rows, at_most, **call.constants(blocks))
        return
    shape = (len(call.query_lens), call.n_kv_heads, n_rows, splits)
    parts = call.q.new_empty(*shape, call.q.shape[2], dtype=torch.float32)
    logs = call.q.new_empty(*shape, dtype=torch.float32)
    _decode[grid](*call.arguments(), parts, logs, n_rows, at_most, **call.constants(blocks))
    _merge[n_rows, call.n_kv_heads, len(call.query_lens)](
        parts,
        logs,
        call.out,
        call.query_lens.starts(call.q.device),
        at_most,
        GROUP=call.group,
        N_KV_HEADS=call.n_kv_heads,
        HEAD_DIM=call.q.shape[2],
        N_SPLITS=splits,
        enable_fp_fusion=True,
        **early_launch(),
    )


def block_sizes(operand: tl.dtype, n_rows: int, kept: torch.dtype, device: Processors) -> Blocks:
    """By what products are of, the rows that there are, and what keys and values are kept in."""
    rows = max(16, triton.next_power_of_2(n_rows))  # a product has 16 at least
    # As in prefill.block_sizes.
    keys = 32 if rows == 128 and not device.multiply_in_shared_memory else 64
    if operand == tl.float32 and not INTERPRETED:
        keys = 16
    # The page table is one stage ahead of the keys, and these of their product. Pages of int8 are
    # widened in registers, which leaves room for half the programs: each reads two blocks ahead.
    warps = 8 if rows == 128 else 4  # which would not have registers for so many
    return Blocks(rows, keys, warps, stages=5 if kept == torch.int8 else 3)


def n_splits(n_programs: int, n_keys: int, device: torch.device) -> int:
    """Runs of keys that fill the device: a power of two.

    Args:
        n_programs: if keys are not split.
        n_keys: that a sequence's queries see, at most.
    """
    wanted = PROGRAMS * _multiprocessors(device) // n_programs
    most = max(1, min(wanted, n_keys // SPLIT_KEYS, MOST_SPLITS))
    return 1 << (most.bit_length() - 1)


@cache
def _multiprocessors(device: torch.device) -> int:
    if INTERPRETED:
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["table_stride", "window", "n_rows", "at_most"])
def _decode(
    q: typing.Any,
    out: typing.Any,
    pages: typing.Any,
    page_table: typing.Any,
    table_stride: typing.Any,
    starts: typing.Any,
    kv_lens: typing.Any,
    scale: typing.Any,
    window: typing.Any,
    parts: typing.Any,  # [B, N_KV_HEADS, n_rows, n_splits, HEAD_DIM] fp32; None: `out` is written
    logs: typing.Any,  # [B, N_KV_HEADS, n_rows, n_splits] fp32: log2 of the parts' weights
    n_rows: typing.Any,
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
    split, n_splits = tl.program_id(0), tl.num_programs(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    start = tl.load(starts + sequence)
    n_queries = tl.load(starts + sequence + 1) - start
    if (n_queries == 0) | (n_queries > at_most):
        return

    n_keys = tl.load(kv_lens + sequence)
    past = n_keys - n_queries
    first_block = first_seen_by(past, window) // BLOCK_KEYS
    n_blocks = tl.cdiv(tl.cdiv(n_keys, BLOCK_KEYS) - first_block, n_splits)
    begin = (first_block + split * n_blocks) * BLOCK_KEYS
    query, places, present = rows_of(
        start, 0, n_queries, kv_head, GROUP, N_KV_HEADS, HEAD_DIM, BLOCK_ROWS
    )
    sums, highest, total = attend(
        tl.load(q + places, mask=present, other=0.0),
        past + query,
        past,
        n_keys - 1,
        begin,
        tl.minimum(begin + n_blocks * BLOCK_KEYS, n_keys),
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
    # Worked out anew: see _prefill.
    start = tl.load(starts + sequence)
    n_queries = tl.load(starts + sequence + 1) - start
    _, places, present = rows_of(
        start, 0, n_queries, kv_head, GROUP, N_KV_HEADS, HEAD_DIM, BLOCK_ROWS
    )
    divisor = tl.where(total == 0, 1.0, total)
    result = sums / divisor[:, None]
    if parts is None:
        tl.store(out + places, result.to(out.dtype.element_ty), mask=present)
    else:
        row = tl.arange(0, BLOCK_ROWS)
        part = ((sequence * N_KV_HEADS + kv_head) * n_rows + row) * n_splits + split
        column = tl.arange(0, HEAD_DIM)
        tl.store(parts + part[:, None] * HEAD_DIM + column[None, :], result, mask=present)
        log = tl.where(total == 0, float("-inf"), highest + tl.log2(divisor))
        tl.store(logs + part[:, None], log[:, None], mask=present)


@triton.jit(do_not_specialize=["at_most"])
def _merge(
    parts: typing.Any,
    logs: typing.Any,
    out: typing.Any,
    starts: typing.Any,
    at_most: typing.Any,
    GROUP: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    N_SPLITS: tl.constexpr,
) -> None:
    wait_for_previous()
    row, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.load(starts + sequence)
    n_queries = tl.load(starts + sequence + 1) - start
    query = row // GROUP
    if (query >= n_queries) | (n_queries > at_most):
        return

    part = (sequence * N_KV_HEADS + kv_head) * tl.num_programs(0) + row
    part = part * N_SPLITS + tl.arange(0, N_SPLITS)
    log = tl.load(logs + part)
    weights = tl.exp2(log - tl.maximum(tl.max(log, 0), LOWEST))
    total = tl.sum(weights, 0)
    column = tl.arange(0, HEAD_DIM)
    values = tl.load(parts + part[:, None] * HEAD_DIM + column[None, :])
    result = tl.sum(values * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    head = kv_head * GROUP + row % GROUP
    place = ((start + query).to(tl.int64) * (N_KV_HEADS * GROUP) + head) * HEAD_DIM
    tl.store(out + place + column, result.to(out.dtype.element_ty))
