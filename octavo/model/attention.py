"""Grouped-query attention with a window per layer, over packed sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo import kernels
from octavo.cache import PassPages
from octavo.config import ModelConfig
from octavo.model.last_tokens import LastTokens
from octavo.model.linear import LinearInput, make_linear, run_linears


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
        x: LinearInput,
        rotary: tuple[Tensor, Tensor],
        seqlens: Sequence[int],
        batch: PassPages | None,
        last: LastTokens | None = None,
    ) -> Tensor:
        """[T, dim] to the same, or with `last` to [R, dim]; no sequence sees another's tokens."""
        return self.wo(self.attend(x, rotary, seqlens, batch, last))

    def attend(
        self,
        x: LinearInput,
        rotary: tuple[Tensor, Tensor],
        seqlens: Sequence[int],
        batch: PassPages | None,
        last: LastTokens | None = None,
    ) -> Tensor:
        """All heads' outputs, [T, n_heads * head_dim]: what wo is given.

        Args:
            x: [T, dim].
            rotary: cos and sin of each token's position.
            seqlens: tokens of each sequence.
            batch: their pages; None for whole sequences that are not kept.
            last: the tokens whose outputs are wanted, [R, …] instead of all; None for all.
        """
        q, k, v = (
            each.view(len(each), -1, self.head_dim)
            for each in run_linears(x, self.wq, self.wk, self.wv)
        )
        if batch is not None:
            layer = batch.layer(self.layer)
            q = kernels.rotary_append(q, k, v, *rotary, layer.pages, layer.slot_mapping)
            page_table, query_lens, kv_lens = layer.page_table, batch.query_lens, batch.kv_lens
            if last is not None:
                q, query_lens = q[last.rows], last.query_lens
                if not query_lens:
                    return q.flatten(1)
                page_table, kv_lens = last.sequences(page_table, kv_lens)
            out = kernels.paged_attention(
                q, layer.pages, page_table, query_lens, kv_lens, self.window
            )
            return out.flatten(1)
        q = kernels.apply_rotary(q, *rotary)
        k = kernels.apply_rotary(k, *rotary)
        lengths = list(seqlens)
        sequences = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        outputs = [kernels.attention(*sequence, self.window) for sequence in sequences]
        out = torch.cat(outputs).flatten(1)
        return out if last is None else out[last.rows]
