"""The linears whose weights, and inputs, are stored in few bits, and the grids they are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels.int8 import int8_product, row_blocks
from octavo.kernels.reference import rms_norm, silu_mul
from octavo.schemes import FP8_MAX

FP8_DTYPE = torch.float8_e4m3fn


class QuantizedTokens(NamedTuple):
    """Activations in int8: x ≈ scale · q.

    Attributes:
        q: [T, K] int8 in -127…127.
        scale: [T, 1] fp32.
        dtype: what x was in, and a linear's result will be.
    """

    q: Tensor
    scale: Tensor
    dtype: torch.dtype


def quantize_per_token(x: Tensor) -> QuantizedTokens:
    """Symmetric int8 with one scale a token: x ≈ scale · q, scale = max|x| / 127.

    Args:
        x: [T, K] float. A row of zeros gets scale 1.
    """
    x32 = x.float()
    scale = _scale_per_token(x32, 127.0)
    q = torch.round(x32 / scale).clamp_(-127, 127).to(torch.int8)
    return QuantizedTokens(q, scale, x.dtype)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> QuantizedTokens:
    """`rms_norm` and `quantize_per_token` in one, in fp32 all through; arguments as in the first.

    The linears after a norm share its output, which is quantised once.
    """
    normed = rms_norm(x.float(), weight.float(), eps)
    return quantize_per_token(normed)._replace(dtype=x.dtype)


def add_rms_norm_quantize(
    x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, QuantizedTokens]:
    """`reference.add_rms_norm` whose norm is `rms_norm_quantize`; arguments as in the first."""
    total = x + y
    return total, rms_norm_quantize(total, weight, eps)


def silu_mul_quantize(gate: Tensor, up: Tensor) -> QuantizedTokens:
    """`silu_mul` and `quantize_per_token` in one, in fp32 all through; the first's arguments."""
    product = silu_mul(gate.float(), up.float())
    return quantize_per_token(product)._replace(dtype=gate.dtype)


def quantize_fp8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float8 e4m3 (Micikevicius et al. 2022), to the nearest, ties to even: x ≈ scale · q.

    Args:
        x: [T, K] float.
        scale: [1] fp32; None takes max|x| / 448 of each token. What it makes greater than 448 is
            cut there.

    Returns:
        q [T, K] float8_e4m3fn and scale, [1] as given or [T, 1] fp32. A row of zeros gets scale 1.
    """
    x32 = x.float()
    if scale is None:
        scale = _scale_per_token(x32, FP8_MAX)
    return (x32 / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scale


def _scale_per_token(x: Tensor, largest: float) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / largest
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def pack_int4(q: Tensor) -> Tensor:
    """Eight int4 numbers an int32, as compressed-tensors' `pack-quantized` format has them.

    Args:
        q: [N, K] int8 in -8…7; 8 divides K.

    Returns:
        [N, K/8] int32: number i of eight, plus 8, in bits 4i to 4i + 3.
    """
    nibbles = (q + 8).to(torch.uint8)
    # The lowest byte of an int32 comes first in memory, as on every machine octavo runs on.
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """[N, K/8] int32 to [N, K] int8 in -8…7: `pack_int4` undone."""
    pairs = packed.contiguous().view(torch.uint8)  # [N, K/2]
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1)
    return nibbles.view(torch.int8).flatten(1) - 8


def dequantize_groups(q: Tensor, scale: Tensor) -> Tensor:
    """scale · q in fp32.

    Args:
        q: [N, K] int8.
        scale: [N, G] fp32, each for K/G neighbours of a row.
    """
    return (q.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def linear_w8a8(
    x: Tensor | QuantizedTokens, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x @ weightᵀ + bias, the product in integers: int8 by int8 into int32, then both scales.

    Args:
        x: [T, K], quantised; or float, to be quantised here.
        weight: [N, K] int8.
        weight_scale: [N] fp32, one a row of the weight.
        bias: [N] fp32, or None.

    Returns:
        [T, N] in x's dtype.
    """
    q, scale, dtype = quantize_per_token(x) if isinstance(x, Tensor) else x
    product = int8_product(q, weight).float().mul_(scale).mul_(weight_scale)
    return (product if bias is None else product.add_(bias)).to(dtype)


def linears_w8a8(
    x: Tensor | QuantizedTokens, weights: Sequence[Tensor], weight_scales: Sequence[Tensor]
) -> list[Tensor]:
    """Several linears of the same input: `linear_w8a8` of each, x quantised once.

    Args:
        x: [T, K], quantised or float.
        weights: each [N, K] int8, of any N.
        weight_scales: of each weight, [N] fp32.

    Returns:
        Of each weight [T, N] in x's dtype.
    """
    tokens = quantize_per_token(x) if isinstance(x, Tensor) else x
    return [linear_w8a8(tokens, *each) for each in zip(weights, weight_scales, strict=True)]


def linear_w4a8(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x @ weightᵀ in integers within each group of inputs, then the group's and token's scales.

    Args:
        x: [T, K] float; quantised here, per token.
        weight: [N, K] int8 in -8…7.
        weight_scale: [N, G] fp32, each for K/G neighbours of a row.

    Returns:
        [T, N] in x's dtype; the groups are added up in fp32.
    """
    q, scale, _ = quantize_per_token(x)
    group_size = weight.shape[1] // weight_scale.shape[1]
    total = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    groups = zip(q.split(group_size, 1), weight.split(group_size, 1), weight_scale.t(), strict=True)
    for q_group, weight_group, group_scale in groups:
        total.addcmul_(int8_product(q_group, weight_group).float(), group_scale)
    return total.mul_(scale).to(x.dtype)


def linear_w4a16(x: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """x @ weightᵀ in x's dtype, of a weight that is made whole a block of rows at a time.

    Args:
        x: [T, K] float.
        weight_packed: [N, K/8] int32, as `pack_int4` packs it.
        weight_scale: [N, G] fp32, each for K/G neighbours of a row.

    Returns:
        [T, N] in x's dtype.
    """
    n_rows = weight_packed.shape[0]
    out = x.new_empty(x.shape[0], n_rows)
    for rows in row_blocks(n_rows, x.shape[1]):
        weight = dequantize_groups(unpack_int4(weight_packed[rows]), weight_scale[rows])
        out[:, rows] = x @ weight.to(x.dtype).t()
    return out


def linear_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None
) -> Tensor:
    """x @ weightᵀ of two float8 operands, then both scales.

    A product of two float8 numbers is exact in fp32, where they are added up. No device's own
    float8 product is used yet.

    Args:
        x: [T, K] float; quantised here.
        weight: [N, K] float8_e4m3fn.
        weight_scale: [1] fp32, or [N]: one a row of the weight.
        input_scale: [1] fp32 from calibration; None takes one a token.

    Returns:
        [T, N] in x's dtype.
    """
    q, scale = quantize_fp8(x, input_scale)
    q32 = q.float()
    n_rows, in_features = weight.shape
    row_scale = weight_scale.expand(n_rows)
    out = x.new_empty(x.shape[0], n_rows)
    for rows in row_blocks(n_rows, in_features):
        out[:, rows] = (q32 @ weight[rows].float().t()) * scale * row_scale[rows]
    return out
