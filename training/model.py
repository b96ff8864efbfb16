"""The training forward of the bundled Ministral: equal-length rows, windowed layers in blocks.

Parameter names and the interleaved rotary order are those of Mistral's checkpoints, so that
`state_dict()` is saved as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `params.json`."""

    dim: int = 128
    n_layers: int = 8
    head_dim: int = 32
    hidden_dim: int = 384
    n_heads: int = 4
    n_kv_heads: int = 2
    norm_eps: float = 1e-5
    vocab_size: int = 2048
    rope_theta: float = 1e8
    sliding_window: list[int | None] = field(default_factory=lambda: [None, 64, 64, 64])
    max_seq_len: int = 131072

    def window(self, layer: int) -> int | None:
        """The window of a layer: the pattern repeats over the layers."""
        return self.sliding_window[layer % len(self.sliding_window)]


@dataclass
class Rows:
    """A batch of equal-length rows.

    tokens, positions: int64 [B, T]; documents: int64 [B, T], where tokens attend only within
    their own number (padding has -1), or None where every row is one document without padding.
    `tail`: how many last positions the loss needs. Layers after the last full one see no further
    back than their windows, so nothing else has to be computed there.
    """

    tokens: Tensor
    positions: Tensor
    documents: Tensor | None = None
    tail: int | None = None


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32 [B, T, 1, head_dim / 2], of every position and frequency.

    Angles are taken in float64: at position 131,071 fp32 loses the third decimal.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    return angles.cos().float()[:, :, None], angles.sin().float()[:, :, None]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), … of x [B, T, H, D]: Mistral's interleaved order."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def window_mask(rows: Rows, window: int) -> Tensor:
    """Which of the 2 x window keys of its block a query sees: bool [B * T / window, 1, W, 2W]."""
    positions, documents = rows.positions, rows.documents
    batch, length = positions.shape
    blocks = length // window
    # A position far below zero hides the block before the first one.
    keys = F.pad(positions, (window, 0), value=-(1 << 30)).unfold(1, 2 * window, window)
    distance = positions.view(batch, blocks, window, 1) - keys[:, :, None, :]
    order = torch.arange(window)[:, None] + window - torch.arange(2 * window)[None, :]
    mask = (order >= 0) & (distance < window) & (distance >= 0)
    if documents is not None:
        others = F.pad(documents, (window, 0), value=-2).unfold(1, 2 * window, window)
        mask &= documents.view(batch, blocks, window, 1) == others[:, :, None, :]
    return mask.flatten(0, 1)[:, None]


def full_mask(rows: Rows, queries: int) -> Tensor | None:
    """The mask [B or 1, 1, queries, T] of the last `queries` positions; None: plainly causal."""
    length = rows.tokens.shape[1]
    if rows.documents is None and queries == length:
        return None
    causal = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)[None, None]
    if rows.documents is None:
        return causal
    documents = rows.documents
    return causal & (documents[:, None, -queries:, None] == documents[:, None, None, :])


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention, full or windowed."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.config, self.window = config, window
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, width, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(width, config.dim, bias=False)

    def forward(
        self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor | None, queries: int
    ) -> Tensor:
        """x [B, T, dim] -> [B, queries, dim]: the attention output of the last positions."""
        group = self.config.n_heads // self.config.n_kv_heads
        q = self.wq(x[:, -queries:]).unflatten(-1, (-1, self.config.head_dim))
        k = self.wk(x).unflatten(-1, (-1, self.config.head_dim))
        v = self.wv(x).unflatten(-1, (-1, self.config.head_dim))
        q = rotate(q, cosine[:, -queries:], sine[:, -queries:])
        k = rotate(k, cosine, sine)
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        if self.window is not None and mask is not None:
            return self.wo(windowed_attention(q, k, v, mask, self.window).flatten(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(out.transpose(1, 2).flatten(2))


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window: int) -> Tensor:
    """Each block of `window` queries against its own and the preceding block of keys."""
    batch, length, heads, dim = q.shape
    blocks = length // window
    q = q.reshape(batch * blocks, window, heads, dim).transpose(1, 2)

    def pairs(t: Tensor) -> Tensor:
        t = t.reshape(batch, blocks, window, heads, dim)
        before = F.pad(t[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((before, t), dim=2).flatten(0, 1).transpose(1, 2)

    # Written out: at this size PyTorch's fused operator is about twice as slow to train.
    scores = (q @ pairs(k).transpose(-1, -2)).float() * dim**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
    out = weights @ pairs(v)
    return out.transpose(1, 2).reshape(batch, length, heads, dim)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, config.window(layer))
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor | None, queries: int
    ) -> Tensor:
        out = self.attention(self.attention_norm(x), cosine, sine, mask, queries)
        x = x[:, -queries:] + out
        return x + self.feed_forward(self.ffn_norm(x))


class Ministral(nn.Module):
    """The transformer; `forward` gives normed hidden states, `output` turns them into logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        full = [layer for layer in range(config.n_layers) if config.window(layer) is None]
        self.last_full = full[-1]

    def forward(self, rows: Rows) -> Tensor:
        """Hidden states [B, queries, dim] of the last positions (all of them without a tail)."""
        config, length = self.config, rows.tokens.shape[1]
        window = max(w for w in config.sliding_window if w is not None)
        queries = length
        if rows.tail is not None:
            behind = config.n_layers - 1 - self.last_full
            queries = min(length, -(-rows.tail // window) * window + behind * window)
        cosine, sine = rotary_table(rows.positions, config.head_dim, config.rope_theta)
        local = window_mask(rows, window)
        x = self.tok_embeddings(rows.tokens)
        for number, layer in enumerate(self.layers):
            wanted = queries if number >= self.last_full else length
            if config.window(number) is None:
                x = layer(x, cosine, sine, full_mask(rows, wanted), wanted)
                if wanted < length:
                    cosine, sine = cosine[:, -wanted:], sine[:, -wanted:]
                    documents = None if rows.documents is None else rows.documents[:, -wanted:]
                    local = window_mask(
                        Rows(rows.tokens[:, -wanted:], rows.positions[:, -wanted:], documents),
                        window,
                    )
            else:
                x = layer(x, cosine, sine, local, wanted)
        return self.norm(x)


def initialise(model: Ministral, seed: int = 0) -> None:
    """Normal weights of 1 / sqrt(fan in), residual outputs scaled down by the depth."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        deviation = parameter.shape[1] ** -0.5
        if name.endswith(("wo.weight", "w2.weight")):
            deviation /= (2 * model.config.n_layers) ** 0.5
        if name.startswith("tok_embeddings"):
            deviation = 1.0
        with torch.no_grad():
            parameter.normal_(0, deviation, generator=generator)
