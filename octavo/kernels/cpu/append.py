"""Turning queries and keys and storing keys and values, by the C++ library (`native/append*`)."""

from __future__ import annotations

import ctypes
from functools import cache, partial

import torch
from torch import Tensor

from octavo.kernels import append
from octavo.kernels.cpu import library as native
from octavo.kernels.cpu.attention import DTYPES, serves
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages

_POINTERS = (
    "q", "k", "v", "turned", "cos", "sin", "keys", "values", "key_scales", "value_scales", "slots",
)  # fmt: skip
_SIZES = (
    "n_tokens", "n_heads", "n_kv_heads", "head_dim", "page_size", "n_threads", "q_dtype",
    "kv_dtype",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`AppendCall` of native/append.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
    )


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pages: KVPages, slot_mapping: Tensor
) -> Tensor:
    """As `octavo.kernels.append.rotary_append`, same arguments; by the library where it can be."""
    isa = best_isa()
    if isa is None or not serves(q, pages):
        return append.rotary_append(q, k, v, cos, sin, pages, slot_mapping)
    return _append(isa, q, k, v, cos, sin, pages, slot_mapping)


@cache
def best_isa() -> int | None:
    """The widest instructions that compute right here, by ISAS; None: not the library."""
    calls = {"octavo_rotary_append": _Call}
    return native.widest_right(_is_right, "storing keys and values", calls)


def _append(
    isa: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: KVPages,
    slot_mapping: Tensor,
) -> Tensor:
    """The same with given instructions, an index into ISAS that the machine has."""
    n_tokens, n_heads, head_dim = q.shape
    _, n_kv_heads, page_size, _ = pages.keys.shape
    assert all(tensor is None or tensor.is_contiguous() for tensor in pages)
    assert q.dtype == k.dtype == v.dtype and len(slot_mapping) == len(k) == len(v) == n_tokens
    tensors = [each.contiguous() for each in (q, k, v, native.empty(q.shape, q.dtype), cos, sin)]
    slot_mapping = slot_mapping.contiguous()
    call = _Call(
        *native.pointers(tensors), *native.pointers(pages), slot_mapping.data_ptr(), n_tokens,
        n_heads, n_kv_heads, head_dim, page_size, torch.get_num_threads(), DTYPES.index(q.dtype),
        DTYPES.index(pages.keys.dtype),
    )  # fmt: skip
    native.run("octavo_rotary_append", call, isa)
    return tensors[3]


def _is_right(isa: int) -> bool:
    """A few tokens against the definition, by all dtypes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, heads, 32, generator=generator) for heads in (4, 2, 2))
    angles = torch.rand(5, 16, generator=generator)
    slots = torch.tensor([3, 9, 4, 0, 11])
    for dtype, kv_dtype, atol in (
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.int8, 0.05),
        (torch.bfloat16, torch.bfloat16, 0.05),
        (torch.bfloat16, torch.int8, 0.05),
    ):
        q, k, v = (each.to(dtype) for each in (q, k, v))
        batches = []
        for compute in (append.rotary_append, partial(_append, isa)):
            pages = [torch.zeros(3, 2, 4, 32, dtype=kv_dtype) for _ in range(2)]
            scales = [torch.zeros(3, 2, 4, dtype=SCALE_DTYPE) for _ in range(2)]
            kept = KVPages(*pages, *scales) if kv_dtype == torch.int8 else KVPages(*pages)
            turned = compute(q, k, v, angles.cos(), angles.sin(), kept, slots)
            batches.append((turned, *kept.gather(torch.arange(3))))
        if not all(torch.allclose(a, b, atol=atol) for a, b in zip(*batches, strict=True)):
            return False
    return True
