"""Keys and values of long chunks in 16 bits: once for all of a chunk's queries, not for each block.

Every block of queries goes over all keys, and has to make floating point of int8 ones as it does.
On Hopper, whose products are quick, that takes longer than the products: 1,247 instructions a warp
for 128 keys, and 623 where keys and values are in bf16. So sequences with many new tokens have
theirs written out in pages of their own first, which live as long as one layer's attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from octavo.kernels.cuda.call import AttentionCall
from octavo.kernels.cuda.early_launch import early_launch, wait_for_previous
from octavo.kernels.cuda.launch import DEVICE, computes_right
from octavo.kernels.cuda.numbers import rounded
from octavo.kernels.cuda.tiling import processors
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages
from octavo.kernels.lens import Lens

# New tokens of a sequence, at least. Three bytes a number are read and written: as 3 TB/s and 400
# TFLOP/s go, a fifth of what the attention of so few takes.
MANY_QUERIES = 256
MOST_BYTES = 512 * 2**20  # of a pass: 131,072 tokens of eight heads of 128 numbers


class _Run(NamedTuple):
    """The blocks of a sequence that its new tokens see: of page_size tokens, from the first on."""

    sequence: int
    first_block: int
    n_blocks: int


def pays(call: AttentionCall) -> bool:
    """Whether there are sequences with many new tokens, and dequantising theirs is worth it."""
    return (
        call.pages.keys.dtype == torch.int8
        and call.q.dtype.itemsize == 2
        and max(call.query_lens) >= MANY_QUERIES
        and not (call.query_lens.are_bounds or call.kv_lens.are_bounds)
        and processors().multiply_in_shared_memory
        and _n_bytes(call) <= MOST_BYTES
    )


def dequantized(call: AttentionCall) -> AttentionCall:
    """The same attention over pages in q's dtype, of sequences with MANY_QUERIES or more alone.

    Pages that none of their new tokens sees are not there, nor are other sequences'.
    """
    keys, values = call.q.new_empty(2, *_shape(call))
    page_table = torch.empty_like(call.page_table)
    _, n_kv_heads, page_size, head_dim = keys.shape
    start = 0
    for sequence, first_block, n_blocks in _runs(call):
        _dequantize_kernel[n_blocks, n_kv_heads](
            call.pages, (keys, values), call.page_table[sequence], page_table[sequence],
            first_block, start, PAGE_SIZE=page_size, HEAD_DIM=head_dim, num_warps=4,
            enable_fp_fusion=False, **early_launch(),
        )  # fmt: skip
        start += n_blocks
    return replace(call, pages=KVPages(keys, values), page_table=page_table)


@cache
def usable() -> bool:
    """Whether the kernel computes right here, which is tried once."""
    return computes_right(
        _is_right, "writing out int8 keys and values", "they are read as they are"
    )


def _runs(call: AttentionCall) -> Iterator[_Run]:
    page_size = call.pages.page_size
    for sequence, (n_new, n_keys) in enumerate(zip(call.query_lens, call.kv_lens, strict=True)):
        if n_new >= MANY_QUERIES:
            first_key = 0 if call.window is None else max(0, n_keys - n_new - call.window + 1)
            first_block = first_key // page_size
            yield _Run(sequence, first_block, -(-n_keys // page_size) - first_block)


def _shape(call: AttentionCall) -> tuple[int, ...]:
    """Of the keys' pages, and of the values'."""
    return (sum(run.n_blocks for run in _runs(call)), *call.pages.keys.shape[1:])


def _n_bytes(call: AttentionCall) -> int:
    return 2 * torch.Size(_shape(call)).numel() * call.q.dtype.itemsize


@triton.jit(do_not_specialize=["first_block", "start"])
def _dequantize_kernel(
    pages: tl.tuple,
    written: tl.tuple,
    page_table: tl.tensor,
    written_table: tl.tensor,
    first_block: tl.tensor,
    start: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    """One head's tokens of a page; a sequence's pages are written in order, from `start` on."""
    wait_for_previous()
    block = first_block + tl.program_id(0)
    head, n_heads = tl.program_id(1), tl.num_programs(1)
    page = tl.load(page_table + block)
    target = (start + tl.program_id(0)).to(tl.int64)
    tl.store(written_table + block, target)  # each head's program the same
    token, column = tl.arange(0, PAGE_SIZE), tl.arange(0, HEAD_DIM)
    slot = (page * n_heads + head) * PAGE_SIZE + token
    place = ((target * n_heads + head) * PAGE_SIZE + token)[:, None] * HEAD_DIM + column[None, :]
    for i in tl.static_range(2):  # keys, values
        numbers = tl.load(pages[i] + slot[:, None] * HEAD_DIM + column[None, :]).to(tl.float32)
        numbers *= tl.load(pages[i + 2] + slot).to(tl.float32)[:, None]
        tl.store(written[i] + place, rounded(numbers, written[i].dtype.element_ty))


def _is_right() -> bool:
    """The pages that a chunk sees in a window against the definition, to the bit."""
    generator = torch.Generator().manual_seed(0)
    shape = (28, 2, 16, 32)
    numbers = torch.randint(-127, 128, (2, *shape), generator=generator, dtype=torch.int8)
    scales = torch.rand(2, *shape[:3], generator=generator).to(DEVICE, SCALE_DTYPE)
    pages = KVPages(*numbers.to(DEVICE), *scales)
    page_table = torch.randperm(28, generator=generator)[None, :25].to(DEVICE)
    q = torch.zeros(MANY_QUERIES, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    n_keys, window = 25 * 16 - 3, 40
    call = AttentionCall(q, q, pages, page_table, Lens([len(q)]), Lens([n_keys]), window)
    found, seen = dequantized(call), slice((n_keys - len(q) - window + 1) // 16, None)
    expected = pages.gather(page_table[0, seen])
    return all(
        torch.equal(own, wanted.to(q.dtype))
        for own, wanted in zip(found.pages.gather(found.page_table[0, seen]), expected, strict=True)
    )
