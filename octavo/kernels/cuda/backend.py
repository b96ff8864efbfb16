"""The operations on a GPU: by Triton where its kernels serve, else by PyTorch."""

from octavo.kernels.cuda.append import rotary_append
from octavo.kernels.cuda.attention import attention, attention_bytes, paged_attention
from octavo.kernels.cuda.quantize import (
    add_rms_norm,
    add_rms_norm_quantize,
    quantize_per_token,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from octavo.kernels.cuda.top_p import keep_top_p
from octavo.kernels.cuda.w8a8 import linear_w8a8, linears_w8a8
from octavo.kernels.plain import (
    FEED_FORWARD_TOKENS,
    check_kernels,
    empty,
    linear,
    pack_w8a8,
    reuse_memory,
)

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
