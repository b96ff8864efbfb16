"""Keys and values as they lie in pages: in floating point, or in int8 with a scale each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16


class KVPages(NamedTuple):
    """One layer's pages. A head's tokens of a page lie together, so that they are read in one run.

    Attributes:
        keys, values: [n_pages, n_kv_heads, page_size, head_dim], a float dtype or int8.
        key_scales, value_scales: [n_pages, n_kv_heads, page_size] bf16 where keys and values are
            int8, one a token and head: x ≈ scale · q; else None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.keys.shape[2]

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some pages.

        Args:
            index: [...] int64, pages.

        Returns:
            [..., n_kv_heads, page_size, head_dim] each, as they are kept; fp32 if that is int8.
        """
        keys, values = self.keys[index], self.values[index]
        if self.key_scales is None or self.value_scales is None:
            return keys, values
        return (
            keys * self.key_scales[index][..., None].float(),
            values * self.value_scales[index][..., None].float(),
        )

    def tokens(self, pages: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Keys and values of neighbouring tokens, [high - low, n_kv_heads, head_dim].

        Args:
            pages: [n_blocks] int64, their sequence's pages in order.
            low, high: the tokens low…high-1 of the sequence.
        """
        first = low // self.page_size
        inside = slice(low - first * self.page_size, high - first * self.page_size)
        keys, values = self.gather(pages[first : -(-high // self.page_size)])
        return (
            keys.transpose(1, 2).flatten(0, 1)[inside],
            values.transpose(1, 2).flatten(0, 1)[inside],
        )


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a token and head: x ≈ scale · q, scale = max|x| / 127.

    The scale is rounded to bf16 before anything is divided by it.

    Args:
        x: [T, n_kv_heads, head_dim] float.

    Returns:
        q [T, n_kv_heads, head_dim] int8 in -127…127, and scale [T, n_kv_heads] bf16. Zeros get
        scale 1.
    """
    x32 = x.float()
    scale = (x32.abs().amax(-1) / 127.0).to(SCALE_DTYPE)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = torch.round(x32 / scale.float()[..., None]).clamp_(-127, 127).to(torch.int8)
    return q, scale
