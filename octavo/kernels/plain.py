"""The backend of any device: PyTorch's own operators, in bounded memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from octavo.kernels.append import rotary_append
from octavo.kernels.fused import attention
from octavo.kernels.paged import attention as paged_attention
from octavo.kernels.quantized import (
    add_rms_norm_quantize,
    linear_w8a8,
    linears_w8a8,
    quantize_per_token,
    rms_norm_quantize,
    silu_mul_quantize,
)
from octavo.kernels.reference import add_rms_norm, rms_norm, silu_mul
from octavo.kernels.top_p import keep_top_p
from octavo.kernels.widened import linear

FEED_FORWARD_TOKENS = None  # all: a GPU is idle in products of few


def check_kernels() -> None:
    """Nothing: they are the definitions, or checked when they are first used."""


def pack_w8a8(weight: Tensor) -> None:
    """Nothing: the definition takes weights as they lie in a checkpoint."""


def attention_bytes(kept: torch.dtype) -> int:
    """What a layer's attention takes beside its operands, by dtype of keys and values; at most."""
    return 128 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """PyTorch's memory."""
    return torch.empty(shape, dtype=dtype, device=device)


def reuse_memory() -> AbstractContextManager[None]:
    """Nothing: PyTorch keeps a device's memory by itself."""
    return nullcontext()


__all__ = [
    "FEED_FORWARD_TOKENS",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "attention",
    "attention_bytes",
    "check_kernels",
    "empty",
    "keep_top_p",
    "linear",
    "linear_w8a8",
    "linears_w8a8",
    "pack_w8a8",
    "paged_attention",
    "quantize_per_token",
    "reuse_memory",
    "rms_norm",
    "rms_norm_quantize",
    "rotary_append",
    "silu_mul",
    "silu_mul_quantize",
]
