"""The operations on a CPU: by the C++ library, oneDNN or PyTorch, whichever is found to serve."""

from octavo.kernels.cpu.append import rotary_append
from octavo.kernels.cpu.attention import attention, paged_attention
from octavo.kernels.cpu.checks import check_kernels
from octavo.kernels.cpu.library import empty, reuse_memory
from octavo.kernels.cpu.linear import linear
from octavo.kernels.cpu.rows import (
    add_rms_norm,
    add_rms_norm_quantize,
    quantize_per_token,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from octavo.kernels.cpu.w8a8 import FEED_FORWARD_TOKENS, linear_w8a8, linears_w8a8, pack_w8a8
from octavo.kernels.plain import attention_bytes, keep_top_p

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
