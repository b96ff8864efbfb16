"""The operations a forward pass is made of, each defined in plain PyTorch.

The model calls these names and never asks which implementation answers.
"""

from octavo.kernels.cpu.w8a8 import PackedWeight
from octavo.kernels.dispatch import (
    add_rms_norm,
    add_rms_norm_quantize,
    attention,
    attention_bytes,
    check_kernels,
    empty,
    feed_forward_tokens,
    keep_top_p,
    linear,
    linear_w8a8,
    linears_w8a8,
    pack_w8a8,
    paged_attention,
    quantize_per_token,
    reuse_memory,
    rms_norm,
    rms_norm_quantize,
    rotary_append,
    silu_mul,
    silu_mul_quantize,
)
from octavo.kernels.int8 import int8_product
from octavo.kernels.kv_pages import KVPages
from octavo.kernels.lens import Lens
from octavo.kernels.quantized import (
    QuantizedTokens,
    dequantize_groups,
    linear_fp8,
    linear_w4a8,
    linear_w4a16,
    pack_int4,
    quantize_fp8,
    unpack_int4,
)
from octavo.kernels.reference import apply_rotary
from octavo.kernels.widened import multiplies_bfloat16

__all__ = [
    "KVPages",
    "Lens",
    "PackedWeight",
    "QuantizedTokens",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "apply_rotary",
    "attention",
    "attention_bytes",
    "check_kernels",
    "dequantize_groups",
    "empty",
    "feed_forward_tokens",
    "int8_product",
    "keep_top_p",
    "linear",
    "linear_fp8",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linears_w8a8",
    "multiplies_bfloat16",
    "pack_int4",
    "pack_w8a8",
    "paged_attention",
    "quantize_fp8",
    "quantize_per_token",
    "reuse_memory",
    "rms_norm",
    "rms_norm_quantize",
    "rotary_append",
    "silu_mul",
    "silu_mul_quantize",
    "unpack_int4",
]
