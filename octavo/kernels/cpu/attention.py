"""Attention by the C++ library (`native/attention*`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from octavo.kernels import fused, paged
from octavo.kernels.cpu import library as native
from octavo.kernels.cpu.library import FLOATS
from octavo.kernels.kv_pages import KVPages, quantize_kv
from octavo.kernels.lens import Lens

DTYPES = (*FLOATS, torch.int8)  # by their numbers in native/attention.h
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
    # A sequence that is not kept is one page.
    pages = KVPages(k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    isa = best_isa()
    if isa is None or not serves(q, pages):
        return fused.attention(q, k, v, window)
    pages = KVPages(pages.keys.contiguous(), pages.values.contiguous())
    return _attend(isa, q, pages, _FIRST_PAGE, [q.shape[0]], [k.shape[0]], window)


def paged_attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """As `paged.attention_reference`, same arguments; by the library where it can be used."""
    isa = best_isa()
    if isa is None or not serves(q, pages):
        return paged.attention(q, pages, page_table, query_lens, kv_lens, window)
    return _attend(isa, q, pages, page_table, query_lens, kv_lens, window)


@cache
def best_isa() -> int | None:
    """The widest instructions that compute right here, by ISAS; None: not the library."""
    return native.widest_right(_is_right, "attention", {"octavo_attention": _Call})


def serves(q: Tensor, pages: KVPages) -> bool:
    """Whether the library takes such queries and pages."""
    return (
        q.device.type == "cpu"
        and q.dtype in FLOATS
        and pages.keys.dtype in DTYPES
        and q.shape[-1] % HEAD_DIM_MULTIPLE == 0
    )


def _attend(
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
    assert sum(query_lens) == len(q) and len(page_table) == len(query_lens) == len(kv_lens)
    q, page_table = q.contiguous(), page_table.contiguous()
    out = native.empty(q.shape, q.dtype)
    new, kept = Lens.of(query_lens).on_host(), Lens.of(kv_lens).on_host()
    call = _Call(
        q.data_ptr(), out.data_ptr(), *native.pointers(pages), page_table.data_ptr(),
        new.data_ptr(), kept.data_ptr(), len(page_table), page_table.shape[1], n_heads,
        n_kv_heads, head_dim, page_size, window or 0, torch.get_num_threads(),
        DTYPES.index(q.dtype), DTYPES.index(pages.keys.dtype),
    )  # fmt: skip
    native.run("octavo_attention", call, isa)
    return out


def _is_right(isa: int) -> bool:
    """A batch against the definition, with and without window.

    A chunk whose keys are packed, a few tokens whose keys are not, and one of so many that they are
    cut into runs.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(22, 2, 32, 64, generator=generator) for _ in range(2))
    q = torch.randn(31, 6, 64, generator=generator)
    table = torch.randperm(22, generator=generator).expand(3, -1)
    query_lens, kv_lens = [20, 10, 1], [29, 12, 700]
    in_int8 = (quantize_kv(x.flatten(0, 1)) for x in (keys, values))
    (k, k_scales), (v, v_scales) = (
        (x.view_as(keys), scales.view(keys.shape[:3])) for x, scales in in_int8
    )
    for queries, pages, error in (
        (q, KVPages(keys, values), 1e-5),
        (q.bfloat16(), KVPages(keys.bfloat16(), values.bfloat16()), 0.01),
        (q, KVPages(k, v, k_scales, v_scales), 0.02),
    ):
        for window in (None, 5):
            batch = (queries, pages, table, query_lens, kv_lens, window)
            expected = paged.attention_reference(*batch).float()
            # Written so that a NaN is wrong.
            if not (_attend(isa, *batch) - expected).norm() <= error * expected.norm():
                return False
    return True
