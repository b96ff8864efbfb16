"""Linears by the C++ library (`native/linear*`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from octavo.kernels import quantized, reference, widened
from octavo.kernels.cpu import library as native
from octavo.kernels.cpu import memory
from octavo.kernels.cpu.library import FLOATS
from octavo.kernels.quantized import QuantizedTokens

PANEL = 16  # outputs, as in native/linear.h
INPUT_MULTIPLE = 16
# Up to so many tokens the library's bf16 product is the fastest. Beyond, blocks in fp32 are; or
# where the CPU multiplies bf16 by itself, by AVX-512 or by AMX, PyTorch's own product.
MOST_TOKENS, MOST_TOKENS_AVX512, MOST_TOKENS_AMX = 64, 96, 32


class _W8A8Call(ctypes.Structure):
    """`W8A8Call` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "scale", "packed", "weight_scale", "out")),
        *((name, ctypes.c_int64) for name in ("n_tokens", "n_outputs", "n_inputs", "n_threads")),
        ("is_bf16", ctypes.c_int64),
    )


class _W8A8Calls(ctypes.Structure):
    """`W8A8Calls` of native/linear.h."""

    _fields_ = (
        ("calls", ctypes.POINTER(_W8A8Call)), ("n_calls", ctypes.c_int64),
        ("laid_out", ctypes.c_void_p),
    )  # fmt: skip


class _BF16Call(ctypes.Structure):
    """`BF16Call` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("n_tokens", "n_outputs", "n_inputs", "n_threads")),
    )


class PanelWeight:
    """An int8 weight in panels, as the library's W8A8 product reads it.

    Args:
        weight: [N, K] int8, K a multiple of 4.
        isa: the instructions that multiply it, an index into ISAS; None: `best_isa`'s.

    Attributes:
        shape: (out_features, in_features).
        panels: as native/linear.h says.
        isa: as given.
    """

    def __init__(self, weight: Tensor, isa: int | None = None) -> None:
        n_outputs, n_inputs = weight.shape
        self.shape = (n_outputs, n_inputs)
        isa = best_isa() if isa is None else isa
        assert isa is not None, "not without the library"
        self.isa = isa
        self.panels = memory.zeros((-(-n_outputs // PANEL), PANEL * n_inputs), torch.int8)
        weight = weight.contiguous()
        library = native.load()
        assert library is not None
        failed = library.octavo_pack_w8(
            ctypes.c_void_p(weight.data_ptr()), ctypes.c_int64(n_outputs),
            ctypes.c_int64(n_inputs), ctypes.c_void_p(self.panels.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()), ctypes.c_int64(self.isa),
        )  # fmt: skip
        if failed:
            raise ValueError(f"this machine does not run {native.ISAS[self.isa]}")

    @staticmethod
    def serves(weight: Tensor) -> bool:
        """Whether a weight [N, K] can be packed so."""
        return weight.device.type == "cpu" and weight.shape[1] % 4 == 0

    def multiply(self, x: QuantizedTokens, weight_scale: Tensor) -> Tensor:
        """As `octavo.kernels.linear_w8a8`, bit by bit."""
        return multiply_all(x, [self], [weight_scale])[0]


def multiply_all(
    x: QuantizedTokens, weights: Sequence[PanelWeight], weight_scales: Sequence[Tensor]
) -> list[Tensor]:
    """As `octavo.kernels.linears_w8a8`, bit by bit; all packed for the same instructions."""
    n_tokens, threads = x.q.shape[0], torch.get_num_threads()
    dtype = x.dtype if x.dtype in FLOATS else torch.float32
    q, scale = x.q.contiguous(), x.scale.contiguous()
    scales = [each.contiguous() for each in weight_scales]
    outs = [native.empty((n_tokens, weight.shape[0]), dtype) for weight in weights]
    calls = [
        _W8A8Call(
            q.data_ptr(), scale.data_ptr(), weight.panels.data_ptr(), weight_scale.data_ptr(),
            out.data_ptr(), n_tokens, *weight.shape, threads, dtype == torch.bfloat16,
        )
        for weight, weight_scale, out in zip(weights, scales, outs, strict=True)
    ]  # fmt: skip
    call = _W8A8Calls((_W8A8Call * len(calls))(*calls), len(calls))
    isa = weights[0].isa
    laid_out = native.empty((native.size("octavo_w8a8_laid_out_bytes", call, isa),), torch.int8)
    call.laid_out = laid_out.data_ptr()
    native.run("octavo_linears_w8a8", call, isa)
    return outs if dtype == x.dtype else [out.to(x.dtype) for out in outs]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `octavo.kernels.widened.linear`, same arguments; few tokens by bf16 by the library."""
    is_bf16 = x.dtype == weight.dtype == torch.bfloat16
    serves = x.device.type == "cpu" and is_bf16 and x.dim() == 2
    if not serves or x.shape[1] % INPUT_MULTIPLE:
        return widened.linear(x, weight)
    isa = best_isa()
    if isa is None or x.shape[0] > _most_tokens(isa):
        return widened.linear(x, weight)
    return _linear_bf16(x, weight, isa)


def _most_tokens(isa: int) -> int:
    if not widened.multiplies_bfloat16():
        return MOST_TOKENS
    return MOST_TOKENS_AVX512 if native.ISAS[isa] == "avx512" else MOST_TOKENS_AMX


@cache
def best_isa() -> int | None:
    """The widest instructions that compute right here, by ISAS; None: not the library."""
    calls = {
        "octavo_linears_w8a8": _W8A8Calls,
        "octavo_linear_w8a8": _W8A8Call,
        "octavo_linear_bf16": _BF16Call,
    }
    return native.widest_right(_is_right, "a linear", calls)


def _linear_bf16(x: Tensor, weight: Tensor, isa: int) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = native.empty((x.shape[0], weight.shape[0]), torch.bfloat16)
    call = _BF16Call(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], *weight.shape,
        torch.get_num_threads(),
    )  # fmt: skip
    native.run("octavo_linear_bf16", call, isa)
    return out


def _is_right(isa: int) -> bool:
    """Small products against their definitions, at the ends of the range.

    Of one token, a tile and several, which take different ways through the kernel. Outputs that are
    no multiple of 16 are left to vectors where there is AMX, of bf16.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (33, 64), generator=generator, dtype=torch.int8)
    weight[0] = 127
    weight_scale = torch.rand(33, generator=generator)
    x = torch.randn(30, 64, generator=generator)
    x[0] = 1
    panels, halves = PanelWeight(weight, isa), weight[:32].bfloat16()
    for rows in (x[:1], x[:7], x):
        tokens, half = quantized.quantize_per_token(rows), rows.bfloat16()
        expected = quantized.linear_w8a8(tokens, weight, weight_scale)
        if not torch.equal(panels.multiply(tokens, weight_scale), expected):
            return False
        near = reference.linear(half, halves).float()
        if not torch.allclose(_linear_bf16(half, halves, isa).float(), near, rtol=0.01):
            return False
    return True
