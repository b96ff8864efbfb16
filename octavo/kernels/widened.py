"""Products with floating-point weights, on processors that are slow in the weights' own dtype.

A CPU without bf16 instructions multiplies bf16 matrices a number at a time: 11 GFLOP/s where fp32
reaches 85 (AVX2, one core, 4096 x 4096 by 64 tokens). There, blocks of weights are widened to fp32
and multiplied in it; one after another, so that a widened copy of them all is never in memory.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**21  # widened at a time: 8 MiB
FEW_TOKENS = 4  # up to which reading the weights takes the time, and bf16 halves that


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ, summed in fp32.

    Args:
        x: [T, K], fp32, bf16 or fp16; the result has its dtype.
        weight: [N, K] of the same dtype.

    Returns:
        [T, N].
    """
    slow = x.device.type == "cpu" and x.dtype != torch.float32 and not multiplies_bfloat16()
    if not slow or x.shape[0] <= FEW_TOKENS:
        return F.linear(x, weight)
    return linear_widened(x, weight)


def linear_widened(x: Tensor, weight: Tensor) -> Tensor:
    """As `linear`, a block of the weight's rows at a time in fp32."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    wide = x.float()
    rows = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows].float()
        out[:, start : start + rows] = F.linear(wide, block)
    return out


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bf16 by itself; PyTorch's own names, which may go away."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
