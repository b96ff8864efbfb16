"""The operations on a GPU: by Triton where its kernels serve, else by PyTorch."""

from octavo.kernels.cuda.attention import attention, paged_attention
from octavo.kernels.plain import (
    linear,
    linear_w8a8,
    pack_w8a8,
    quantize_per_token,
    rms_norm,
    rms_norm_quantize,
    rotary_append,
    silu_mul,
    silu_mul_quantize,
)

__all__ = [
    "attention",
    "linear",
    "linear_w8a8",
    "pack_w8a8",
    "paged_attention",
    "quantize_per_token",
    "rms_norm",
    "rms_norm_quantize",
    "rotary_append",
    "silu_mul",
    "silu_mul_quantize",
]
