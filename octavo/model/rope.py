"""Rotary position embedding: the angles of every position."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i / head_dim) (Su et al. 2021, eq. 15).

    The product is taken in fp64: at position 131,071 its fp32 rounding alone would turn the
    fastest pair by 0.008 rad.

    Args:
        positions: [T] integers.
        head_dim: even.
        theta: the base, 1e8 for Ministral.

    Returns:
        cos, sin: [T, head_dim/2] fp32.
    """
    frequencies = _frequencies(head_dim, theta, positions.device)
    angles = positions.to(torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / head_dim), [head_dim/2] fp64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    return theta ** (-exponents / head_dim)
