"""Attention by the C++ library (`native/attention*`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from octavo.kernels import fused, paged
from octavo.kernels.cpu import library as native
from octavo.kernels.cpu.library import ISAS
from octavo.kernels.kv_pages import KVPages

DTYPES = (torch.float32, torch.bfloat16, torch.int8)  # by their numbers in native/attention.h
HEAD_DIM_MULTIPLE = 32  # two of the widest vectors
_FIRST_PAGE = torch.zeros(1, 1, dtype=torch.int64)
_POINTERS = (
    "q", "out", "keys", "values", "key_scales", "value_scales", "page_table", "query_lens",
    "kv_lens",
)  # fmt: skip
_SIZES = (
    "n_sequences", "table_stride", "n_heads", "n_kv_heads", "head_dim", "page_size", "window",
    "n_threads", "q_dtype", "kv_dtype",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`AttentionCall` of native/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
    )


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """As `octavo.kernels.reference.attention`, same arguments; by the library where it can be."""
    library = usable()
    # A sequence that is not kept is one page.
    pages = KVPages(k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    if library is None or not _serves(q, pages):
        return fused.attention(q, k, v, window)
    pages = KVPages(pages.keys.contiguous(), pages.values.contiguous())
    isa = library.octavo_best_isa()
    return _attend(library, isa, q, pages, _FIRST_PAGE, [q.shape[0]], [k.shape[0]], window)


def paged_attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """As `paged.attention_reference`, same arguments; by the library where it can be used."""
    library = usable()
    if library is None or not _serves(q, pages):
        return paged.attention(q, pages, page_table, query_lens, kv_lens, window)
    isa = library.octavo_best_isa()
    return _attend(library, isa, q, pages, page_table, query_lens, kv_lens, window)


@cache
def usable() -> ctypes.CDLL | None:
    """The library; None where there is none, or it computes wrong here, which is said once."""
    library = native.load()
    if library is not None and not _is_right(library):
        native.distrust("attention")
        return None
    return library


def _serves(q: Tensor, pages: KVPages) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and pages.keys.dtype in DTYPES
        and q.shape[-1] % HEAD_DIM_MULTIPLE == 0
    )


def _attend(
    library: ctypes.CDLL,
    isa: int,
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """The same with given instructions, an index into ISAS that the machine has."""
    _, n_heads, head_dim = q.shape
    _, n_kv_heads, page_size, _ = pages.keys.shape
    assert all(tensor is None or tensor.is_contiguous() for tensor in pages)
    q, page_table = q.contiguous(), page_table.contiguous()
    out = torch.empty_like(q)
    lens = torch.tensor([query_lens, kv_lens], dtype=torch.int64)
    call = _Call(
        q.data_ptr(), out.data_ptr(), *native.pointers(pages), page_table.data_ptr(),
        lens[0].data_ptr(), lens[1].data_ptr(), len(page_table), page_table.shape[1], n_heads,
        n_kv_heads, head_dim, page_size, window or 0, torch.get_num_threads(),
        DTYPES.index(q.dtype), DTYPES.index(pages.keys.dtype),
    )  # fmt: skip
    if library.octavo_attention(ctypes.byref(call), isa):
        raise ValueError(f"this machine does not run {ISAS[isa]}")
    return out


def _is_right(library: ctypes.CDLL) -> bool:
    """A small batch against the definition: a chunk and single tokens, with and without window."""
    generator = torch.Generator().manual_seed(0)
    pages = KVPages(*(torch.randn(6, 2, 4, 32, generator=generator) for _ in range(2)))
    q = torch.randn(12, 6, 32, generator=generator)
    table, query_lens, kv_lens = torch.tensor([[4, 1, 5], [3, 0, 2]]), [11, 1], [12, 9]
    for window in (None, 5):
        batch = (q, pages, table, query_lens, kv_lens, window)
        found = _attend(library, library.octavo_best_isa(), *batch)
        if not torch.allclose(found, paged.attention_reference(*batch), atol=1e-4):
            return False
    return True
