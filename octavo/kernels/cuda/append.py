"""Turning queries and keys and storing keys and values, in Triton."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels import plain
from octavo.kernels.cuda.early_launch import early_launch, wait_for_previous
from octavo.kernels.cuda.launch import DEVICE, computes_right, runs_on
from octavo.kernels.cuda.numbers import int8_scale, magnitude, rounded, to_int8
from octavo.kernels.cuda.quantize import FLOATS
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pages: KVPages, slot_mapping: Tensor
) -> Tensor:
    """As `octavo.kernels.append.rotary_append`, same arguments, bit by bit."""
    kept = pages.keys.dtype
    serves = runs_on(q) and q.dtype in FLOATS and (kept in FLOATS or kept == torch.int8)
    if not (serves and usable()):
        return plain.rotary_append(q, k, v, cos, sin, pages, slot_mapping)
    return _append(q, k, v, cos, sin, pages, slot_mapping)


@cache
def usable() -> bool:
    """Whether the kernel computes right here, which is tried once."""
    return computes_right(_is_right, "storing keys and values")


def _append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pages: KVPages, slot_mapping: Tensor
) -> Tensor:
    n_tokens, n_heads, head_dim = q.shape
    _, n_kv_heads, page_size, _ = pages.keys.shape
    assert all(tensor is None or tensor.is_contiguous() for tensor in pages)
    q, k, v, cos, sin = (each.contiguous() for each in (q, k, v, cos, sin))
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = n_heads // n_kv_heads
    _append_kernel[(n_tokens, n_kv_heads)](
        q, k, v, turned, cos, sin, *pages, slot_mapping.contiguous(), n_kv_heads, head_dim // 2,
        PAGE_SIZE=page_size, GROUP=group, GROUP_BLOCK=triton.next_power_of_2(group),
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=1, enable_fp_fusion=False,
        **early_launch(),
    )  # fmt: skip
    return turned


@triton.jit
def _turned(
    x: tl.tensor, at: tl.tensor, inside: tl.tensor, half: tl.tensor, cos: tl.tensor, sin: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of heads, turned in fp32 and rounded to the dtype they were in."""
    first = tl.load(x + at, inside, 0.0).to(tl.float32)
    second = tl.load(x + at + half, inside, 0.0).to(tl.float32)
    return (
        rounded(first * cos - second * sin, x.dtype.element_ty),
        rounded(second * cos + first * sin, x.dtype.element_ty),
    )


@triton.jit
def _store(
    first: tl.tensor,
    second: tl.tensor,
    pages: tl.tensor,
    scales: tl.tensor,
    place: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    half: tl.tensor,
) -> None:
    """Both halves of a head into its place, in the pages' dtype; with a scale if they have any."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    pages += place * 2 * half + at
    if scales is None:
        tl.store(pages, rounded(first, pages.dtype.element_ty), inside)
        tl.store(pages + half, rounded(second, pages.dtype.element_ty), inside)
    else:
        largest = tl.maximum(magnitude(first), magnitude(second))
        scale = int8_scale(largest, 0, scales.dtype.element_ty)
        tl.store(scales + place, rounded(scale, scales.dtype.element_ty))
        tl.store(pages, to_int8(first, scale), inside)
        tl.store(pages + half, to_int8(second, scale), inside)


@triton.jit
def _append_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    turned: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    slots: tl.tensor,
    n_kv_heads: tl.tensor,
    half: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """A token's key and value of one head, and the queries that read them."""
    wait_for_previous()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, HALF_BLOCK)
    inside = at < half
    own_cos = tl.load(cos + token * half + at, inside, 0.0)
    own_sin = tl.load(sin + token * half + at, inside, 0.0)

    queries = tl.arange(0, GROUP_BLOCK)
    is_query = (queries < GROUP)[:, None] & inside[None, :]
    rows = (token * n_kv_heads + head) * GROUP + queries
    block = rows[:, None] * 2 * half + at[None, :]
    first, second = _turned(q, block, is_query, half, own_cos[None, :], own_sin[None, :])
    tl.store(turned + block, first, is_query)
    tl.store(turned + block + half, second, is_query)

    slot = tl.load(slots + token)
    place = (slot // PAGE_SIZE * n_kv_heads + head) * PAGE_SIZE + slot % PAGE_SIZE
    row = (token * n_kv_heads + head) * 2 * half + at
    key_first, key_second = _turned(k, row, inside, half, own_cos, own_sin)
    _store(key_first, key_second, keys, key_scales, place, at, inside, half)
    value_first = tl.load(v + row, inside, 0.0)
    value_second = tl.load(v + row + half, inside, 0.0)
    _store(value_first, value_second, values, value_scales, place, at, inside, half)


def _is_right() -> bool:
    """A few tokens against the definition, in floating point and in int8."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, heads, 32, generator=generator).to(DEVICE) for heads in (6, 2, 2))
    angles = torch.rand(5, 16, generator=generator).to(DEVICE)
    slots = torch.tensor([3, 9, 4, 0, 11], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        batches = []
        for compute in (plain.rotary_append, _append):
            pages = torch.zeros(2, 3, 2, 4, 32, dtype=dtype, device=DEVICE)
            scales = torch.zeros(2, 3, 2, 4, dtype=SCALE_DTYPE, device=DEVICE)
            kept = KVPages(*pages, *scales) if dtype == torch.int8 else KVPages(*pages)
            turned = compute(q, k, v, angles.cos(), angles.sin(), kept, slots)
            batches.append((turned, *kept.gather(torch.arange(3, device=DEVICE))))
        if not all(torch.allclose(a, b, atol=0.05) for a, b in zip(*batches, strict=True)):
            return False
    return True
