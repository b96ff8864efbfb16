"""Rounding inside Triton's kernels, to the bit as PyTorch rounds."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.cuda import launch

_INTERPRETED = tl.constexpr(launch.INTERPRETED)
_BITS_BELOW_BF16 = tl.constexpr(0xFFFF)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
_MIDDLE = tl.constexpr(1.5 * 2**23)  # from here to 2**24, numbers in fp32 are the whole ones
_MIDDLE_BITS = tl.constexpr(0x4B400000)  # the same number's


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """An fp32 block in another float dtype, to the nearest, ties to even.

    The interpreter cuts numbers off where they become bf16, so there they are rounded before.
    """
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        up = (_BITS_BELOW_BF16 >> 1) + ((bits >> 16) & 1)
        nearest = ((bits + up) & ~_BITS_BELOW_BF16).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """|x| of an fp32 block as its bits, int32: in the same order, and NaN the greatest."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS


@triton.jit
def int8_scale(magnitudes: tl.tensor, axis: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """The largest magnitude along an axis over 127, NaN if one of them is; zeros get scale 1.

    A maximum of floats would pass over NaN, one of their magnitudes does not.

    Returns:
        fp32, but rounded to `dtype`.
    """
    largest = tl.max(magnitudes, axis).to(tl.float32, bitcast=True)
    scale = rounded(tl.div_rn(largest, 127.0), dtype).to(tl.float32)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def to_int8(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """x / scale in fp32, to the nearest whole number, ties to even, cut at ±127.

    Adding so great a number leaves no room for a fraction, and rounds as every addition does; the
    whole number is then in the lowest bits. NaN becomes some number, whose scale is NaN.
    """
    shifted = tl.div_rn(x, scale) + _MIDDLE
    whole = shifted.to(tl.int32, bitcast=True) - _MIDDLE_BITS
    return tl.minimum(tl.maximum(whole, -127), 127).to(tl.int8)
