"""Grouped-query attention with a window per layer, over packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo import kernels
from octavo.cache import RaggedCache
from octavo.config import ModelConfig
from octavo.model.linear import make_linear


class Attention(nn.Module):
    """One layer's attention; `window` None sees everything before a token."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        self.wq = make_linear(config, f"layers.{layer}.attention.wq")
        self.wk = make_linear(config, f"layers.{layer}.attention.wk")
        self.wv = make_linear(config, f"layers.{layer}.attention.wv")
        self.wo = make_linear(config, f"layers.{layer}.attention.wo")

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        seqlens: Sequence[int],
        cache: Sequence[RaggedCache] | None,
    ) -> Tensor:
        """[T, dim] to [T, dim]; tokens of different sequences never see each other."""
        return self.wo(self.attend(x, rotary, seqlens, cache))

    def attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        seqlens: Sequence[int],
        cache: Sequence[RaggedCache] | None,
    ) -> Tensor:
        """All heads' outputs, [T, n_heads * head_dim]: what wo is given."""
        q = self.wq(x).view(-1, self.n_heads, self.head_dim)
        k = self.wk(x).view(-1, self.n_kv_heads, self.head_dim)
        v = self.wv(x).view(-1, self.n_kv_heads, self.head_dim)
        q = kernels.apply_rotary(q, *rotary)
        k = kernels.apply_rotary(k, *rotary)
        outputs = []
        start = 0
        for i, n_tokens in enumerate(seqlens):
            span = slice(start, start + n_tokens)
            keys, values = k[span], v[span]
            if cache is not None:
                sequence = cache[i]
                keys, values = sequence.layers[self.layer].extend(sequence.length, keys, values)
            outputs.append(kernels.attention(q[span], keys, values, self.window))
            start += n_tokens
        return torch.cat(outputs).flatten(1)
