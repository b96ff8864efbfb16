"""The definition of every operation, in plain PyTorch, as short as it can be said."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, the mean in fp32 (Zhang & Sennrich 2019, eq. 4).

    Args:
        x: [T, dim], any float dtype; the result has it too.
        weight: [dim].
        eps: added to the mean of squares.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What a block gives, added to the stream, and the norm before the next block.

    Args:
        x, y: [T, dim], of one float dtype.
        weight, eps: as in `rms_norm`.

    Returns:
        x + y, rounded to their dtype, and its `rms_norm`.
    """
    total = x + y
    return total, rms_norm(total, weight, eps)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ, summed in fp32.

    Args:
        x: [T, K], any float dtype; the result has it too.
        weight: [N, K] of the same dtype.
    """
    return F.linear(x.float(), weight.float()).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up, both [T, hidden_dim] (SwiGLU, Shazeer 2020, eq. 6)."""
    return F.silu(gate) * up


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim/2]) by its angle (Su et al. 2021, half-split order).

    Args:
        x: [T, heads, head_dim].
        cos, sin: [T, head_dim/2] fp32, from `octavo.model.rope.rotary_angles`.

    Returns:
        [T, heads, head_dim] in x's dtype; the turn itself is done in fp32.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, head_dim/2]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def int8_product(q: Tensor, weight: Tensor) -> Tensor:
    """q @ weightᵀ in integers, exact.

    Args:
        q: [T, K] int8.
        weight: [N, K] int8.

    Returns:
        [T, N] whole numbers, int32 or fp32.
    """
    return torch._int_mm(q, weight.t())


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal grouped-query attention of one sequence, over all its keys at once, in fp32.

    The queries are the last positions of the keys: query i stands at position T_k - T_q + i and
    sees the keys at and before it, with a window only the last `window` of them.

    Args:
        q: [T_q, n_heads, head_dim]; heads of a group are neighbours.
        k, v: [T_k, n_kv_heads, head_dim], T_k >= T_q.
        window: tokens, or None for full attention.

    Returns:
        [T_q, n_heads, head_dim] in q's dtype.
    """
    n_queries, n_heads, head_dim = q.shape
    n_keys, n_kv_heads, _ = k.shape
    group = n_heads // n_kv_heads
    keys = k.float().repeat_interleave(group, dim=1)  # [T_k, n_heads, head_dim]
    values = v.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) / math.sqrt(head_dim)
    behind = (
        torch.arange(n_keys - n_queries, n_keys, device=q.device)[:, None]
        - torch.arange(n_keys, device=q.device)[None, :]
    )  # [T_q, T_k]: how far each key lies behind each query
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, values).to(q.dtype)
