"""Norms, gates and the making of int8 inputs, in Triton: a program takes a row at once."""

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
from octavo.kernels.quantized import QuantizedTokens

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take
MOST_COLUMNS = 2**16  # of a row; up to 2**14 it stays in registers
_WARP_COLUMNS = 512  # that a warp takes, 16 a thread
_MOST_WARPS = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `octavo.kernels.reference.rms_norm`, same arguments."""
    if not (_serves(x) and weight.dtype == x.dtype and usable()):
        return plain.rms_norm(x, weight, eps)
    return _rms_norm(x, weight, eps)[1]


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `octavo.kernels.reference.add_rms_norm`, same arguments."""
    if not (_serves(x) and x.dtype == y.dtype == weight.dtype and usable()):
        return plain.add_rms_norm(x, y, weight, eps)
    return _rms_norm(x, weight, eps, y)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `octavo.kernels.reference.silu_mul`, same arguments."""
    if not (_serves(gate) and up.dtype == gate.dtype and usable()):
        return plain.silu_mul(gate, up)
    return _silu_mul(gate, up)


def quantize_per_token(x: Tensor) -> QuantizedTokens:
    """As `octavo.kernels.quantized.quantize_per_token`, bit by bit."""
    if not (_serves(x) and usable()):
        return plain.quantize_per_token(x)
    return _quantize(x)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> QuantizedTokens:
    """As `octavo.kernels.quantized.rms_norm_quantize`, same arguments."""
    if not (_serves(x) and usable()):
        return plain.rms_norm_quantize(x, weight, eps)
    return _rms_norm_quantize(x, weight, eps)[1]


def add_rms_norm_quantize(
    x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, QuantizedTokens]:
    """As `octavo.kernels.quantized.add_rms_norm_quantize`, same arguments."""
    if not (_serves(x) and x.dtype == y.dtype and usable()):
        return plain.add_rms_norm_quantize(x, y, weight, eps)
    return _rms_norm_quantize(x, weight, eps, y)


def silu_mul_quantize(gate: Tensor, up: Tensor) -> QuantizedTokens:
    """As `octavo.kernels.quantized.silu_mul_quantize`, same arguments."""
    if not (_serves(gate) and usable()):
        return plain.silu_mul_quantize(gate, up)
    return _silu_mul_quantize(gate, up)


@cache
def usable() -> bool:
    """Whether the kernels compute right here, which is tried once."""
    return computes_right(_is_right, "norms and quantising")


def _serves(x: Tensor) -> bool:
    return runs_on(x) and x.dtype in FLOATS and x.shape[-1] <= MOST_COLUMNS


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + `added`, or x itself, and the norm of that."""
    x, weight = x.contiguous(), weight.contiguous()
    added, total = _to_add(x, added)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm_kernel[(len(x),)](x, added, total, weight, out, eps, x.shape[1], **_options(x))
    return total, out


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _silu_mul_kernel[(len(gate),)](gate, up, out, gate.shape[1], **_options(gate))
    return out


def _quantize(x: Tensor) -> QuantizedTokens:
    x, tokens = x.contiguous(), _empty_tokens(x)
    _quantize_kernel[(len(x),)](x, tokens.q, tokens.scale, x.shape[1], **_options(x))
    return tokens


def _rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, QuantizedTokens]:
    """As `_rms_norm`, in int8."""
    x, weight, tokens = x.contiguous(), weight.contiguous(), _empty_tokens(x)
    added, total = _to_add(x, added)
    _rms_norm_quantize_kernel[(len(x),)](
        x, added, total, weight, tokens.q, tokens.scale, eps, x.shape[1], **_options(x)
    )
    return total, tokens


def _silu_mul_quantize(gate: Tensor, up: Tensor) -> QuantizedTokens:
    gate, up, tokens = gate.contiguous(), up.contiguous(), _empty_tokens(gate)
    _silu_mul_quantize_kernel[(len(gate),)](
        gate, up, tokens.q, tokens.scale, gate.shape[1], **_options(gate)
    )
    return tokens


def _to_add(x: Tensor, added: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """What a norm's kernel adds to x, and where the total goes; x is its own without."""
    if added is None:
        return None, x
    return added.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty_tokens(x: Tensor) -> QuantizedTokens:
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return QuantizedTokens(q, torch.empty(len(x), 1, device=x.device), x.dtype)


def _options(x: Tensor) -> dict[str, int | bool]:
    """The power of two that holds a row, and the warps that share it."""
    block = triton.next_power_of_2(x.shape[1])
    n_warps = min(max(1, block // _WARP_COLUMNS), _MOST_WARPS)
    return {"BLOCK": block, "num_warps": n_warps, "enable_fp_fusion": False, **early_launch()}


@triton.jit
def _row(x: tl.tensor, row: tl.tensor, columns: tl.tensor, n_columns: tl.tensor) -> tl.tensor:
    """A row in fp32, zeros behind its end."""
    return tl.load(x + row * n_columns + columns, columns < n_columns, 0.0).to(tl.float32)


@triton.jit
def _unit_row(
    x: tl.tensor,
    added: tl.tensor,
    total: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    n_columns: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:
    """A row over the root of its mean square; where something is added to it, of the total."""
    values = _row(x, row, columns, n_columns)
    if added is not None:
        values += _row(added, row, columns, n_columns)
        stored = rounded(values, total.dtype.element_ty)
        tl.store(total + row * n_columns + columns, stored, columns < n_columns)
        values = stored.to(tl.float32)
    return values * tl.rsqrt(tl.sum(values * values, 0) / n_columns + eps)


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _store_quantized(
    values: tl.tensor,
    q: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    n_columns: tl.tensor,
) -> None:
    own = int8_scale(magnitude(values), 0, tl.float32)
    tl.store(scale + row, own)
    tl.store(q + row * n_columns + columns, to_int8(values, own), columns < n_columns)


@triton.jit
def _quantize_kernel(
    x: tl.tensor, q: tl.tensor, scale: tl.tensor, n_columns: tl.tensor, BLOCK: tl.constexpr
) -> None:
    wait_for_previous()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    _store_quantized(_row(x, row, columns, n_columns), q, scale, row, columns, n_columns)


@triton.jit
def _rms_norm_quantize_kernel(
    x: tl.tensor,
    added: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    q: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    n_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    wait_for_previous()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    unit = _unit_row(x, added, total, row, columns, n_columns, eps)
    normed = unit * _row(weight, 0, columns, n_columns)
    _store_quantized(normed, q, scale, row, columns, n_columns)


@triton.jit
def _silu_mul_quantize_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    q: tl.tensor,
    scale: tl.tensor,
    n_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    wait_for_previous()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    product = _silu(_row(gate, row, columns, n_columns)) * _row(up, row, columns, n_columns)
    _store_quantized(product, q, scale, row, columns, n_columns)


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,
    added: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    n_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Rounded before the weight as well as after, as the definition does."""
    wait_for_previous()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    dtype: tl.constexpr = out.dtype.element_ty
    unit = _unit_row(x, added, total, row, columns, n_columns, eps)
    unit = rounded(unit, dtype).to(tl.float32)
    normed = rounded(unit * _row(weight, 0, columns, n_columns), dtype)
    tl.store(out + row * n_columns + columns, normed, columns < n_columns)


@triton.jit
def _silu_mul_kernel(
    gate: tl.tensor, up: tl.tensor, out: tl.tensor, n_columns: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Rounded before the product as well as after, as the definition does."""
    wait_for_previous()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    dtype: tl.constexpr = out.dtype.element_ty
    opened = rounded(_silu(_row(gate, row, columns, n_columns)), dtype).to(tl.float32)
    product = rounded(opened * _row(up, row, columns, n_columns), dtype)
    tl.store(out + row * n_columns + columns, product, columns < n_columns)


def _is_right() -> bool:
    """A few rows against the definitions, one of them zeros, one with a number that is none."""
    generator = torch.Generator().manual_seed(0)
    x, second = (torch.randn(4, 200, generator=generator).to(DEVICE) for _ in range(2))
    weight = torch.rand(200, generator=generator).to(DEVICE)
    x[1], x[2, 7] = 0, float("nan")
    pairs = [
        (_quantize(x), plain.quantize_per_token(x)),
        (_rms_norm_quantize(x, weight, 1e-5)[1], plain.rms_norm_quantize(x, weight, 1e-5)),
        (_silu_mul_quantize(x, second), plain.silu_mul_quantize(x, second)),
    ]
    numbers = [0, 1, 3]  # rows of which int8 says something
    quantised = all(
        torch.allclose(found.scale, expected.scale, equal_nan=True)
        and (found.q[numbers].int() - expected.q[numbers].int()).abs().max() <= 1
        for found, expected in pairs
    )
    half, half_weight = x.bfloat16(), weight.bfloat16()
    total, normed = _rms_norm(half, half_weight, 1e-5, half.flip(0))
    floats = [
        (_rms_norm(half, half_weight, 1e-5)[1], plain.rms_norm(half, half_weight, 1e-5)),
        (normed, plain.rms_norm(total, half_weight, 1e-5)),
        (total, half + half.flip(0)),
        (_silu_mul(half, half), plain.silu_mul(half, half)),
    ]
    return quantised and all(
        torch.allclose(found.float(), expected.float(), rtol=0.02, atol=1e-6, equal_nan=True)
        for found, expected in floats
    )
