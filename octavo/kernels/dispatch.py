"""The operations as the model calls them: each goes to the backend of the device it is on.

A backend is a module with one function an operation, all of the signatures below. What it has no
faster twin of, or what its twin does not take, it leaves to PyTorch's (`plain`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from octavo.kernels.cpu.w8a8 import PackedWeight
from octavo.kernels.kv_pages import KVPages
from octavo.kernels.quantized import QuantizedTokens

logger = logging.getLogger("octavo")

# By a device's type. ROCm's devices call themselves cuda too, and Triton compiles for both.
_MODULES = {"cpu": "octavo.kernels.cpu.backend", "cuda": "octavo.kernels.cuda.backend"}
_PLAIN = "octavo.kernels.plain"


@cache
def backend(device_type: str) -> ModuleType:
    """The module that computes on devices of this type."""
    name = _MODULES.get(device_type, _PLAIN)
    if device_type == "cuda" and find_spec("triton") is None:
        logger.warning("octavo: triton is not installed; the GPU runs on PyTorch alone, slower")
        name = _PLAIN
    return import_module(name)


def _of(x: Tensor | QuantizedTokens) -> ModuleType:
    return backend((x if isinstance(x, Tensor) else x.q).device.type)


def check_kernels(device: torch.device) -> None:
    """Choose a CPU's kernels now: to check them takes memory, which a model may take later."""
    backend(device.type).check_kernels()


def reuse_memory(device: torch.device) -> AbstractContextManager[None]:
    """Within, large results on a device are made in memory that is kept for the next time."""
    context: AbstractContextManager[None] = backend(device.type).reuse_memory()
    return context


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result, whatever it holds; kept memory within `reuse_memory`."""
    memory: Tensor = backend(device.type).empty(shape, dtype, device)
    return memory


def feed_forward_tokens(device: torch.device) -> int | None:
    """The most tokens whose hidden numbers a W8A8 feed-forward should make at a time; None: all."""
    n_tokens: int | None = backend(device.type).FEED_FORWARD_TOKENS
    return n_tokens


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    return _of(x).rms_norm(x, weight, eps)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> QuantizedTokens:
    """As `quantized.rms_norm_quantize`."""
    return _of(x).rms_norm_quantize(x, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`."""
    return _of(x).add_rms_norm(x, y, weight, eps)


def add_rms_norm_quantize(
    x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, QuantizedTokens]:
    """As `quantized.add_rms_norm_quantize`."""
    return _of(x).add_rms_norm_quantize(x, y, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    return _of(gate).silu_mul(gate, up)


def silu_mul_quantize(gate: Tensor, up: Tensor) -> QuantizedTokens:
    """As `quantized.silu_mul_quantize`."""
    return _of(gate).silu_mul_quantize(gate, up)


def quantize_per_token(x: Tensor) -> QuantizedTokens:
    """As `quantized.quantize_per_token`."""
    return _of(x).quantize_per_token(x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `reference.linear`."""
    return _of(x).linear(x, weight)


def pack_w8a8(weight: Tensor) -> PackedWeight | None:
    """An int8 weight [N, K] as its device's product wants it; None: as it is."""
    return backend(weight.device.type).pack_w8a8(weight)


def linear_w8a8(
    x: Tensor | QuantizedTokens,
    weight: Tensor | PackedWeight,
    weight_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """As `quantized.linear_w8a8`; the weight may be packed."""
    return _of(x).linear_w8a8(x, weight, weight_scale, bias)


def linears_w8a8(
    x: Tensor | QuantizedTokens,
    weights: Sequence[Tensor | PackedWeight],
    weight_scales: Sequence[Tensor],
) -> list[Tensor]:
    """As `quantized.linears_w8a8`; the weights may be packed."""
    return _of(x).linears_w8a8(x, weights, weight_scales)


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pages: KVPages, slot_mapping: Tensor
) -> Tensor:
    """As `append.rotary_append`."""
    return _of(q).rotary_append(q, k, v, cos, sin, pages, slot_mapping)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """As `reference.attention`, in bounded memory."""
    return _of(q).attention(q, k, v, window)


def attention_bytes(device: torch.device, kept: torch.dtype) -> int:
    """What attention on a device takes beside its operands, by dtype of keys and values."""
    n_bytes: int = backend(device.type).attention_bytes(kept)
    return n_bytes


def paged_attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
) -> Tensor:
    """As `paged.attention_reference`, in bounded memory."""
    return _of(q).paged_attention(q, pages, page_table, query_lens, kv_lens, window)


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """As `top_p.keep_top_p`."""
    return _of(weights).keep_top_p(weights, top_p)
