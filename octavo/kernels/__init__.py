"""The operations a forward pass is made of; `reference` defines each in plain PyTorch.

The model calls these names and never asks which implementation answers.
"""

from octavo.kernels.blockwise import attention
from octavo.kernels.reference import (
    apply_rotary,
    linear_w8a8,
    quantize_per_token,
    rms_norm,
    silu_mul,
)

__all__ = [
    "apply_rotary",
    "attention",
    "linear_w8a8",
    "quantize_per_token",
    "rms_norm",
    "silu_mul",
]
