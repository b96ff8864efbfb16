"""Operations on the rows of activations, by the C++ library (`native/rows*`)."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from octavo.kernels import quantized, reference
from octavo.kernels.cpu import library as native
from octavo.kernels.cpu.library import FLOATS
from octavo.kernels.quantized import QuantizedTokens

COLUMN_MULTIPLE = 16  # as in native/rows.h
_AS_IT_IS, _RMS_NORM, _SILU_MUL = range(3)


class _Call(ctypes.Structure):
    """`RowsCall` of native/rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "added", "total", "second", "out", "scale")),
        *((name, ctypes.c_int64) for name in ("n_tokens", "n_columns", "operation", "n_threads")),
        ("is_bf16", ctypes.c_int64),
        ("eps", ctypes.c_double),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `octavo.kernels.reference.rms_norm`, rounded once."""
    isa = _isa_for(x, weight)
    if isa is None:
        return reference.rms_norm(x, weight, eps)
    return _run(isa, _RMS_NORM, x, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `octavo.kernels.reference.add_rms_norm`, the sum bit by bit and its norm rounded once."""
    isa = _isa_for(x, weight, y)
    if isa is None:
        return reference.add_rms_norm(x, y, weight, eps)
    total = native.empty(x.shape, x.dtype)
    return total, _run(isa, _RMS_NORM, x, weight, eps, added=y, total=total)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `octavo.kernels.reference.silu_mul`, rounded once."""
    isa = _isa_for(gate, up)
    return reference.silu_mul(gate, up) if isa is None else _run(isa, _SILU_MUL, gate, up)


def quantize_per_token(x: Tensor) -> QuantizedTokens:
    """As `octavo.kernels.quantized.quantize_per_token`, bit by bit."""
    isa = _isa_for(x)
    return quantized.quantize_per_token(x) if isa is None else _quantize(isa, _AS_IT_IS, x)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> QuantizedTokens:
    """As `octavo.kernels.quantized.rms_norm_quantize`, same arguments."""
    isa = _isa_for(x, weight)
    if isa is None:
        return quantized.rms_norm_quantize(x, weight, eps)
    return _quantize(isa, _RMS_NORM, x, weight, eps)


def add_rms_norm_quantize(
    x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, QuantizedTokens]:
    """As `octavo.kernels.quantized.add_rms_norm_quantize`, same arguments."""
    isa = _isa_for(x, weight, y)
    if isa is None:
        return quantized.add_rms_norm_quantize(x, y, weight, eps)
    total = native.empty(x.shape, x.dtype)
    return total, _quantize(isa, _RMS_NORM, x, weight, eps, added=y, total=total)


def silu_mul_quantize(gate: Tensor, up: Tensor) -> QuantizedTokens:
    """As `octavo.kernels.quantized.silu_mul_quantize`, same arguments."""
    isa = _isa_for(gate, up)
    if isa is None:
        return quantized.silu_mul_quantize(gate, up)
    return _quantize(isa, _SILU_MUL, gate, up)


@cache
def best_isa() -> int | None:
    """The widest instructions that compute right here, by ISAS; None: not the library."""
    return native.widest_right(_is_right, "a row's operation", {"octavo_rows": _Call})


def _isa_for(x: Tensor, *others: Tensor) -> int | None:
    """The instructions for such tensors; None: the library does not take them."""
    serves = (
        x.device.type == "cpu"
        and x.dtype in FLOATS
        and all(other.dtype == x.dtype for other in others)
        and x.dim() == 2
        and x.shape[1] % COLUMN_MULTIPLE == 0
    )
    return best_isa() if serves else None


def _run(
    isa: int, operation: int, x: Tensor, second: Tensor, eps: float = 0.0, **rest: Any
) -> Tensor:
    out = native.empty(x.shape, x.dtype)
    _call(isa, operation, x, second, out, None, eps, **rest)
    return out


def _quantize(
    isa: int,
    operation: int,
    x: Tensor,
    second: Tensor | None = None,
    eps: float = 0.0,
    **rest: Any,
) -> QuantizedTokens:
    q = native.empty(x.shape, torch.int8)
    scale = native.empty((x.shape[0], 1), torch.float32)
    _call(isa, operation, x, x if second is None else second, q, scale, eps, **rest)
    return QuantizedTokens(q, scale, x.dtype)


def _call(
    isa: int,
    operation: int,
    x: Tensor,
    second: Tensor,
    out: Tensor,
    scale: Tensor | None,
    eps: float,
    *,
    added: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """One call of the library; `added` to x makes the `total` that takes its place."""
    x, second = x.contiguous(), second.contiguous()
    added = None if added is None else added.contiguous()
    call = _Call(
        *native.pointers((x, added, total, second, out, scale)), *x.shape, operation,
        torch.get_num_threads(), x.dtype == torch.bfloat16, eps,
    )  # fmt: skip
    native.run("octavo_rows", call, isa)


def _is_right(isa: int) -> bool:
    """A few rows against their definitions."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 64, generator=generator) for _ in range(2))
    x[0] = 1
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 0.01)):
        x, y = x.to(dtype), y.to(dtype)
        tokens, found = quantized.quantize_per_token(x), _quantize(isa, _AS_IT_IS, x)
        total = torch.empty_like(x)
        normed = _run(isa, _RMS_NORM, x, y[0], 1e-5, added=y, total=total)
        gated = _run(isa, _SILU_MUL, x, y)
        if not (
            torch.equal(found.q, tokens.q)
            and torch.equal(found.scale, tokens.scale)
            and torch.equal(total, x + y)
            and torch.allclose(normed, reference.rms_norm(total, y[0], 1e-5), rtol=rtol)
            and torch.allclose(gated, reference.silu_mul(x, y), rtol=rtol)
        ):
            return False
    return True
