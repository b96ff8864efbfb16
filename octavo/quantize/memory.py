"""How much memory a quantisation takes, before it takes it."""

from __future__ import annotations

import math

import torch

from octavo.config import ModelConfig
from octavo.errors import ConfigError
from octavo.quantize.gptq import SLAB

RUNTIME_BYTES = 700 * 2**20  # Python, PyTorch and its thread pools, the tokenizer
LOGIT_ROWS = 128  # tokens whose logits are computed at a time
FP32 = 4


def working_set_bytes(config: ModelConfig, dtype: torch.dtype, chunk_tokens: int) -> int:
    """Bytes that are needed at once, whatever the number of samples; an upper estimate.

    Args:
        config: the model's.
        dtype: of the computation.
        chunk_tokens: of the longest chunk.
    """
    shapes = [config.linear_shape(name) for name in config.linear_names()[:7]]
    layer = sum(n * k for n, k in shapes) * (dtype.itemsize + 1)  # as it was, and quantised
    widest = max(k for _, k in shapes)
    hessian = 3 * widest**2 * FP32  # summed, put in order, factorised
    most_rows = max(n for n, _ in shapes)
    slab = 3 * widest * min(SLAB, most_rows) * FP32
    weights = 2 * max(n * k for n, k in shapes) * FP32  # gate and up together
    inner = 6 * chunk_tokens * max(config.hidden_dim, config.dim) * FP32
    logits = 6 * LOGIT_ROWS * config.vocab_size * FP32 + 3 * config.vocab_size * config.dim * 2
    return RUNTIME_BYTES + max(layer + hessian + slab + weights + inner, logits)


def plan(
    config: ModelConfig,
    dtype: torch.dtype,
    chunk_tokens: int,
    streams_bytes: int,
    max_memory: int,
) -> tuple[bool, int]:
    """Share out the memory.

    Args:
        streams_bytes: of all streams of activations.
        max_memory: bytes that the process may keep resident.

    Returns:
        Whether the streams may stay in memory, and the bytes left for inner activations.

    Raises:
        ConfigError: not even one layer at a time fits.
    """
    needed = working_set_bytes(config, dtype, chunk_tokens)
    left = max_memory - needed
    if left < 0:
        raise ConfigError(
            f"max_memory: {max_memory / 2**30:.1f}G is too little for this model and "
            f"{chunk_tokens:,} tokens at a time; it needs "
            f"{math.ceil(needed / 2**30 * 10) / 10:.1f}G"
        )
    resident = streams_bytes <= left
    return resident, left - streams_bytes if resident else left
