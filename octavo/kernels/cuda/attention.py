"""Attention by Triton: chunks go by `prefill`, sequences with few new tokens by `decode`.

Long chunks may have int8 keys and values written out by `dequantize` before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from octavo.kernels import fused, paged, plain
from octavo.kernels.cuda import decode, dequantize, prefill
from octavo.kernels.cuda.call import OPERANDS, AttentionCall
from octavo.kernels.cuda.launch import DEVICE, computes_right, runs_on
from octavo.kernels.cuda.tiling import processors
from octavo.kernels.kv_pages import KVPages, quantize_kv
from octavo.kernels.lens import Lens

HEAD_DIMS = (32, 64, 128)
LARGEST_GROUP = 16  # query heads a key head


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """As `octavo.kernels.reference.attention`, same arguments; by Triton where it can be."""
    # A sequence that is not kept has pages of one token, in order.
    pages = KVPages(k.contiguous()[:, :, None], v.contiguous()[:, :, None])
    if not serves(q, pages) or not _is_trusted(q.dtype, k.dtype, q.shape[2]):
        return fused.attention(q, k, v, window)
    page_table = torch.arange(len(k), device=q.device)[None]
    return _attend(q, pages, page_table, _length(q), _length(k), window)


def paged_attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """As `paged.attention_reference`, same arguments; by Triton where it can be used.

    Lengths that are `Lens` are read on the device, and never there by the host: the list may hold
    bounds of them. A sequence without keys is given zeros.

    Raises:
        RuntimeError: there are but bounds, and Triton cannot be used.
    """
    if not serves(q, pages) or not _is_trusted(q.dtype, pages.keys.dtype, q.shape[2]):
        if any(Lens.of(lens).are_bounds for lens in (query_lens, kv_lens)):
            raise RuntimeError("PyTorch's attention takes lengths from the host")
        return paged.attention(q, pages, page_table, query_lens, kv_lens, window)
    return _attend(q, pages, page_table, query_lens, kv_lens, window)


def attention_bytes(kept: torch.dtype) -> int:
    """As `plain.attention_bytes`, same argument."""
    written = kept == torch.int8 and processors().multiply_in_shared_memory
    return plain.attention_bytes(kept) + written * dequantize.MOST_BYTES


def serves(q: Tensor, pages: KVPages) -> bool:
    """Whether the kernels take such queries and pages."""
    _, n_kv_heads, page_size, head_dim = pages.keys.shape
    return (
        runs_on(q)
        and q.dtype in OPERANDS
        and pages.keys.dtype in (*OPERANDS, torch.int8)
        and head_dim in HEAD_DIMS
        and page_size & (page_size - 1) == 0
        and q.shape[1] // n_kv_heads <= LARGEST_GROUP
    )


def _attend(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """The same by Triton."""
    assert all(tensor is None or tensor.is_contiguous() for tensor in pages)
    q = q.contiguous()
    out = torch.empty_like(q)
    lens = Lens.of(query_lens), Lens.of(kv_lens)
    _launch(AttentionCall(q, out, pages, page_table.contiguous(), *lens, window))
    return out


def _launch(call: AttentionCall) -> None:
    """Write call.out; each kernel gets the whole batch and passes over what is not its own."""
    limit, longest = decode.few_queries(call), max(call.query_lens)
    few = [n for n in call.query_lens if n <= limit]
    if few:
        decode.launch(call, max(few), len(few))
    if _pays_to_dequantize(call):
        many = dequantize.MANY_QUERIES - 1
        prefill.launch(dequantize.dequantized(call), many, longest)
        longest = max((n for n in call.query_lens if n <= many), default=0)
    if longest > limit:
        prefill.launch(call, max(few, default=0), longest)


def _pays_to_dequantize(call: AttentionCall) -> bool:
    """Whether long chunks should read keys and values in q's dtype, and can."""
    dtype, head_dim = call.q.dtype, call.q.shape[2]
    return dequantize.pays(call) and dequantize.usable() and _is_trusted(dtype, dtype, head_dim)


def _length(x: Tensor) -> Lens:
    """One sequence's, there without a copy from the host."""
    return Lens([len(x)], torch.full((1,), len(x), dtype=torch.int32, device=x.device))


@cache
def _is_trusted(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> bool:
    """Whether what is compiled for these fits the device and computes right."""
    what = f"attention of {q_dtype} over pages in {kv_dtype}".replace("torch.", "")
    return computes_right(lambda: _is_right(q_dtype, kv_dtype, head_dim), what)


def _is_right(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> bool:
    """A small batch against the definition: a chunk and a single token, whose keys are split."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(24, 2, 16, head_dim, generator=generator) for _ in range(2))
    q = torch.randn(34, 6, head_dim, generator=generator).to(DEVICE, q_dtype)
    pages = KVPages(keys.to(DEVICE, kv_dtype), values.to(DEVICE, kv_dtype))
    if kv_dtype == torch.int8:
        (k, k_scales), (v, v_scales) = (quantize_kv(x.flatten(0, 1)) for x in (keys, values))
        scales = (scale.view(24, 2, 16).to(DEVICE) for scale in (k_scales, v_scales))
        pages = KVPages(k.view_as(keys).to(DEVICE), v.view_as(keys).to(DEVICE), *scales)
    page_table = torch.randperm(24, generator=generator)[:20].expand(2, 20).to(DEVICE)
    error = 0.02 if kv_dtype == torch.int8 else 0.01 if q_dtype.itemsize == 2 else 1e-5
    for window in (None, 270):
        batch = (q, pages, page_table, [33, 1], [90, 310], window)
        expected = paged.attention_reference(*batch).float()
        # Written so that a NaN is wrong.
        if not (_attend(*batch).float() - expected).norm() <= error * expected.norm():
            return False
    return True
