"""How much memory a quantisation takes, before it takes it."""

from __future__ import annotations

import torch

from octavo.cache.planner import DEVICE_RUNTIME_BYTES, free_bytes
from octavo.config import ModelConfig, format_bytes
from octavo.device import CPU
from octavo.errors import ConfigError
from octavo.quantize import gptq, grid
from octavo.quantize.linears import PROBE_TOKENS
from octavo.quantize.statistics import MOST_SAMPLED, SAMPLE_ELEMENTS

RUNTIME_BYTES = 700 * 2**20  # Python, PyTorch and its thread pools, the tokenizer
LOGIT_ROWS = 128  # tokens whose logits are computed at a time
HEAD_ROWS = 16_384  # of the head's weight, cast at a time
FP32, FP64 = 4, 8
# Linears that share their inputs, by their names in a layer.
GROUPS = (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",))


def tensor_bytes(config: ModelConfig, dtype: torch.dtype, chunk_tokens: int) -> int:
    """The most bytes of tensors at once where layers are computed; an upper estimate.

    It depends on the shape and the longest chunk, not on the number of samples.

    Args:
        config: the model's, with the quantisation to be made.
        dtype: of the computation.
        chunk_tokens: of the longest chunk.
    """
    shapes = {name: config.linear_shape(name) for group in GROUPS for name in group}
    layer = sum(n * k for n, k in shapes.values()) * (dtype.itemsize + 1)  # before and after
    # What makes a group's inputs, a chunk at a time: at its widest the gate, its two factors and an
    # int8 product on its way to one of them, and before it the residual stream and its norm.
    chunk = chunk_tokens * (4 * config.hidden_dim + 4 * config.dim) * FP32
    most = 0
    for group in GROUPS:
        rows, n_inputs = [shapes[name][0] for name in group], shapes[group[0]][1]
        observing = n_inputs**2 * FP32 + _sample_bytes(n_inputs, dtype) + chunk
        most = max(most, observing, _group_bytes(rows, n_inputs, dtype, smoothed=len(group) == 1))
    return max(layer + most, _head_bytes(config, dtype, chunk_tokens))


def plan(
    config: ModelConfig,
    dtype: torch.dtype,
    chunk_tokens: int,
    streams_bytes: int,
    max_memory: int,
    device: torch.device = CPU,
) -> tuple[bool, int]:
    """Share out the memory: the host's, and where layers are computed elsewhere that device's.

    Chunks are the same whatever there is of it, since sums depend on how they are split, and a run
    that goes on elsewhere must give the same bytes.

    Args:
        streams_bytes: of all streams of activations; they stay with the host.
        max_memory: bytes that the process may keep resident, and as many on the device.
        device: where layers are computed.

    Returns:
        Whether the streams may stay in memory, and the bytes left for inner activations where they
        are computed.

    Raises:
        ConfigError: not even one layer at a time fits.
    """
    computing = tensor_bytes(config, dtype, chunk_tokens)
    at_a_time = f"this model and {chunk_tokens:,} tokens at a time"
    if device.type == "cpu":
        needed = RUNTIME_BYTES + computing
        left = _left(max_memory, needed, at_a_time)
        resident = streams_bytes <= left
        return resident, left - streams_bytes if resident else left
    left = _left(max_memory, RUNTIME_BYTES + _passing_bytes(config, dtype), at_a_time)
    needed = DEVICE_RUNTIME_BYTES + computing
    room = _left(max_memory, needed, f"{at_a_time} on {device}")
    free = free_bytes(device)
    if free < needed:
        raise ConfigError(
            f"device: {device} has {format_bytes(free)} free; {at_a_time} need "
            f"{format_bytes(needed, up=True)}: take a shorter --max_sequence_length, or "
            "--device cpu"
        )
    return streams_bytes <= left, min(room, free - needed)


def _left(max_memory: int, needed: int, for_what: str) -> int:
    if max_memory < needed:
        raise ConfigError(
            f"max_memory: {format_bytes(max_memory)} is too little for {for_what}; it needs "
            f"{format_bytes(needed, up=True)}"
        )
    return max_memory - needed


def _group_bytes(rows: list[int], n_inputs: int, dtype: torch.dtype, smoothed: bool) -> int:
    """Of linears with the same inputs, while they are rounded and measured.

    Args:
        rows: N of each linear.
        n_inputs: K.
        dtype: of the computation.
        smoothed: whether other scales of the inputs are tried on a copy of the weight.
    """
    most, hessian = max(rows), n_inputs**2 * FP32
    probe = PROBE_TOKENS * n_inputs * (dtype.itemsize + FP32)
    outputs = PROBE_TOKENS * (sum(rows) + 3 * most) * FP32  # exact; by integers, and the difference
    weights = sum(rows) * n_inputs * (FP32 + 1)  # in fp32, and rounded
    held = hessian + 2 * _sample_bytes(n_inputs, dtype) + probe + outputs + weights
    slab = n_inputs * min(most, gptq.SLAB) * FP32
    trial = most * n_inputs * FP32 + 3 * _sample_bytes(n_inputs, torch.float32) if smoothed else 0
    steps = (
        trial + 2 * n_inputs * min(most, grid.SLAB) * FP32,
        3 * hessian,  # put in order, by rows and by columns, and factorised
        hessian + 4 * slab,
        hessian + 6 * n_inputs * min(most, gptq.COMPARED, grid.SLAB) * FP32,
    )
    return held + max(steps)


def _head_bytes(config: ModelConfig, dtype: torch.dtype, chunk_tokens: int) -> int:
    """Of the head, as it was and as it will be, while it is quantised or compared."""
    n_outputs, n_inputs = config.vocab_size, config.dim
    original = n_outputs * n_inputs * 2
    if config.tied_embeddings:
        as_it_will_be, quantising = 0, 0
    elif config.quantization is not None and "output" in config.quantization.linears:
        as_it_will_be = n_outputs * n_inputs
        quantising = _group_bytes([n_outputs], n_inputs, dtype, smoothed=False)
    else:
        as_it_will_be = n_outputs * n_inputs * 2
        outputs = PROBE_TOKENS * n_outputs * FP32
        quantising = n_outputs * n_inputs * FP32 + as_it_will_be + outputs
    # A chunk in the norm before the head, and the rows on which errors are measured.
    observing = (6 * chunk_tokens + n_inputs + 2 * PROBE_TOKENS) * n_inputs * FP32
    # Both heads' logits, their distributions, and what is made of them.
    comparing = LOGIT_ROWS * n_outputs * (2 * FP32 + 6 * FP64) + HEAD_ROWS * n_inputs * FP32
    return original + max(observing, quantising, as_it_will_be + comparing)


def _sample_bytes(n_inputs: int, dtype: torch.dtype) -> int:
    """Of the rows that `InputStatistics` keeps."""
    return min(MOST_SAMPLED, SAMPLE_ELEMENTS // n_inputs) * n_inputs * dtype.itemsize


def _passing_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of what passes through the host on its way to a device and back."""
    shapes = [config.linear_shape(name) for group in GROUPS for name in group]
    layer = sum(n * k for n, k in shapes) * dtype.itemsize
    return 2 * max(layer, config.vocab_size * config.dim * 2)
