"""Batches of sequences in pages, and everything that attends to them.

q, pages, page_table, query_lens, kv_lens = random_batch(generator, longest_chunk=4, group=2)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels import paged
from octavo.kernels.cpu import attention, library
from octavo.kernels.cuda import attention as cuda_attention
from octavo.kernels.cuda.launch import DEVICE
from octavo.kernels.kv_pages import KVPages, quantize_kv

PAGE = 4
Attend = Callable[..., Tensor]
Batch = tuple[Tensor, KVPages, Tensor, list[int], list[int]]


def by_library(isa: int, *batch: Any) -> Tensor:
    """By the library with given instructions; skips the test where the machine lacks them."""
    if not library.runs(isa):
        pytest.skip(f"no {library.ISAS[isa]} here")
    return attention._attend(isa, *batch)


def by_triton(q: Tensor, pages: KVPages, page_table: Tensor, *rest: Any) -> Tensor:
    """By Triton's kernels, on a GPU or else in its interpreter; skips what they do not take."""
    moved: Any = (None if tensor is None else tensor.to(DEVICE) for tensor in pages)
    there = KVPages(*moved)
    if not cuda_attention.serves(q.to(DEVICE), there):
        pytest.skip("not by Triton")
    out = cuda_attention._attend(q.to(DEVICE), there, page_table.to(DEVICE), *rest)
    return out.to(q.device)


# Those emulated do what others do to int8, AVX-512's and AMX's to bf16 as well, and nothing else.
INT8_NATIVE = {name: partial(by_library, isa) for isa, name in enumerate(library.ISAS)}
NATIVE = {name: attend for name, attend in INT8_NATIVE.items() if "_emulated" not in name}
BF16_EMULATED = {name: INT8_NATIVE[name] for name in ("avx512_emulated", "amx_emulated")}
ATTEND = {"torch": paged.attention} | NATIVE
INT8_ATTEND = {"torch": paged.attention} | INT8_NATIVE
TRITON = {"triton": by_triton}  # slow in the interpreter: not in every test


def random_batch(
    generator: torch.Generator, longest_chunk: int, group: int, head_dim: int = 32
) -> Batch:
    """Sequences with new tokens and a past each, their pages shuffled among unused ones."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    count = pick(1, 7)
    query_lens = [pick(1, longest_chunk + 1) for _ in range(count)]
    kv_lens = [n + pick(0, 60) for n in query_lens]
    n_blocks = max(-(-n // PAGE) for n in kv_lens)
    order = torch.randperm(count * n_blocks + 5, generator=generator)
    page_table = order[: count * n_blocks].view(count, n_blocks)
    shape = (len(order), 2, PAGE, head_dim)
    pages = KVPages(*(torch.randn(shape, generator=generator) for _ in range(2)))
    q = torch.randn(sum(query_lens), 2 * group, head_dim, generator=generator)
    return q, pages, page_table, query_lens, kv_lens


def long_sequence(
    generator: torch.Generator, n_queries: int, n_keys: int, n_kv_heads: int, head_dim: int
) -> Batch:
    """One sequence of many keys in shuffled pages of 16, with four query heads."""
    n_pages = -(-n_keys // 16)
    shape = (n_pages, n_kv_heads, 16, head_dim)
    pages = KVPages(*(torch.randn(shape, generator=generator) for _ in range(2)))
    q = torch.randn(n_queries, 4, head_dim, generator=generator)
    table = torch.randperm(n_pages, generator=generator)[None]
    return q, pages, table, [n_queries], [n_keys]


def quantised(pages: KVPages) -> KVPages:
    """The same pages in int8."""
    kept = []
    for tensor in (pages.keys, pages.values):
        n_pages, n_kv_heads, page_size, head_dim = tensor.shape
        q, scales = quantize_kv(tensor.view(-1, 1, head_dim))
        kept.append((q.view_as(tensor), scales.view(n_pages, n_kv_heads, page_size)))
    (keys, key_scales), (values, value_scales) = kept
    return KVPages(keys, values, key_scales, value_scales)


def poison_all_but(batch: Batch, window: int | None, poison: float) -> None:
    """Write into every slot that the batch's queries do not see, scales included."""
    _, pages, page_table, query_lens, kv_lens = batch
    unseen = torch.ones(len(pages.keys), pages.page_size, dtype=torch.bool)
    for row, n_new, n_keys in zip(page_table, query_lens, kv_lens, strict=True):
        low = 0 if window is None else max(0, n_keys - n_new - window + 1)
        for position in range(low, n_keys):
            unseen[row[position // pages.page_size], position % pages.page_size] = False
    for tensor in pages:
        if tensor is not None:
            worst = poison if tensor.is_floating_point() else 127
            tensor.transpose(1, 2)[unseen] = worst
