"""Nucleus sampling's choice without sorting: by the least weight that stays, found bit by bit.

A batch's vocabularies are millions of numbers to sort, and of a row nothing is wanted but where its
likeliest tokens end. The bits of weights, none of which is negative, are in the weights' order: two
bits at a time, the least weight is found above which the others do not reach top_p yet. Of its
equals as many stay as it takes, the first ones.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels import plain
from octavo.kernels.cuda.early_launch import early_launch, wait_for_previous
from octavo.kernels.cuda.launch import DEVICE, computes_right, runs_on

_BLOCK = 8192  # tokens that a row's program sums up at a time, 16 a thread
_TOP_BIT = tl.constexpr(30)  # of a float's bits, below its sign
_ALL_BITS = tl.constexpr(0x7FFFFFFF)


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """As `octavo.kernels.top_p.keep_top_p`, same arguments; of equals the first stay."""
    serves = runs_on(weights) and weights.dtype == torch.float32 and weights.is_contiguous()
    if not (serves and usable()):
        return plain.keep_top_p(weights, top_p)
    return _keep(weights, top_p)


@cache
def usable() -> bool:
    """Whether the kernel computes right here, which is tried once."""
    return computes_right(_is_right, "top_p")


def _keep(weights: Tensor, top_p: Tensor) -> Tensor:
    n_rows, n_tokens = weights.shape
    block = min(_BLOCK, triton.next_power_of_2(n_tokens))
    _keep_kernel[(n_rows,)](
        weights, top_p.contiguous(), n_tokens, BLOCK=block, num_warps=max(1, block // 512),
        enable_fp_fusion=False, **early_launch(),
    )  # fmt: skip
    return weights


@triton.jit
def _load(
    weights: tl.tensor, start: tl.tensor, n_tokens: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    place = start + tl.arange(0, BLOCK)
    return tl.load(weights + place, place < n_tokens, 0.0)


@triton.jit
def _sum_above(
    weights: tl.tensor, bits: tl.tensor, n_tokens: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Of a row's weights whose bits are more: as sums round, it is no less for fewer bits."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_tokens, BLOCK):
        some = _load(weights, start, n_tokens, BLOCK)
        sums += tl.where(some.to(tl.int32, bitcast=True) > bits, some, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _keep_kernel(
    weights: tl.tensor, top_p: tl.tensor, n_tokens: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """A row."""
    wait_for_previous()
    weights += tl.program_id(0).to(tl.int64) * n_tokens
    share = tl.load(top_p + tl.program_id(0))
    if share < 1:
        wanted = share * _sum_above(weights, -1, n_tokens, BLOCK)
        least = 0
        for step in range(16):
            shift = _TOP_BIT - 2 * step
            # The most that the weights to be left out may be: with these two bits 0, 1, 2.
            first = least | ((1 << shift) - 1)
            second = first | (1 << shift)
            third = tl.where(step == 0, _ALL_BITS, first | (2 << shift))
            a = tl.zeros((BLOCK,), tl.float32)
            b = tl.zeros((BLOCK,), tl.float32)
            c = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, n_tokens, BLOCK):
                some = _load(weights, start, n_tokens, BLOCK)
                bits = some.to(tl.int32, bitcast=True)
                a += tl.where(bits > first, some, 0.0)
                b += tl.where(bits > second, some, 0.0)
                c += tl.where(bits > third, some, 0.0)
            reach = (tl.sum(a, 0) >= wanted).to(tl.int32) + (tl.sum(b, 0) >= wanted).to(tl.int32)
            reach += (tl.sum(c, 0) >= wanted).to(tl.int32)
            least |= reach << shift
        above = _sum_above(weights, least, n_tokens, BLOCK)
        n_equal = 0
        for start in range(0, n_tokens, BLOCK):
            some = _load(weights, start, n_tokens, BLOCK)
            bits = some.to(tl.int32, bitcast=True)
            is_equal = bits == least
            rank = n_equal + tl.cumsum(is_equal.to(tl.int32), 0) - 1
            stays = (bits > least) | (is_equal & (above + rank * some < wanted))
            place = start + tl.arange(0, BLOCK)
            tl.store(weights + place, tl.where(stays, some, 0.0), place < n_tokens)
            n_equal += tl.sum(is_equal.to(tl.int32), 0)


def _is_right() -> bool:
    """Rows of more than a block against the definition; of equals, how many stay."""
    generator = torch.Generator().manual_seed(0)
    weights = (3 * torch.randn(4, _BLOCK + 90, generator=generator)).exp().to(DEVICE)
    weights[1] = 1.0
    weights[2, ::3] = 0.0
    top_p = torch.tensor([[0.8], [0.5], [0.99], [1.0]], device=DEVICE)
    found, expected = (keep(weights.clone(), top_p) for keep in (_keep, plain.keep_top_p))
    counts = [(each > 0).sum(-1) for each in (found, expected)]
    # Sums round otherwise: one token more or less.
    return bool(
        ((counts[0] - counts[1]).abs() <= 1).all()
        and torch.allclose(found.sum(-1), expected.sum(-1), rtol=1e-3)
        and torch.equal(found[found > 0], weights[found > 0])
    )
