"""The Mistral-family decoder: embedding, layers of attention and SwiGLU, norm, head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from octavo import kernels
from octavo.cache import (
    CacheLayout,
    PagedBatch,
    PagePool,
    PassPages,
    RaggedCache,
    kv_dtype,
)
from octavo.checkpoint import Checkpoint, open_checkpoint, resolve_model
from octavo.config import ModelConfig
from octavo.device import CPU, choose_device, current, to_device
from octavo.errors import RequestError
from octavo.model.attention import Attention
from octavo.model.last_tokens import LastTokens
from octavo.model.linear import (
    AnyLinear,
    LinearInput,
    LinearW8A8,
    make_linear,
    pack_linears,
    run_in_parts,
    run_linears,
)
from octavo.model.loading import load_weights
from octavo.model.rope import rotary_angles


@dataclass
class Stream:
    """The residual stream on its way through the layers, in a place of its own.

    So nobody keeps what it was before: of a chunk of 512 tokens that is 8 MB.

    Attributes:
        x: [T, dim].
        added: what the block before gave, [T, dim], still to be added to x: norms add it, so that
            the stream is read once for both; None for nothing.
    """

    x: Tensor
    added: Tensor | None = None

    def total(self) -> Tensor:
        """[T, dim], nothing to be added."""
        return self.x if self.added is None else self.x + self.added


class RMSNorm(nn.Module):
    """Root-mean-square norm.

    Attributes:
        weight: [dim].
        quantizes: whether all linears after it are W8A8, so that one int8 copy serves them.
    """

    def __init__(self, dim: int, eps: float, quantizes: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.quantizes = quantizes
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[T, dim] to the same, in x's dtype."""
        return kernels.rms_norm(x, self.weight, self.eps)

    def for_linears(self, stream: Stream) -> LinearInput:
        """The norm of the stream, as the linears after it take it; what was to be added is."""
        x, added = stream.x, stream.added
        if added is None:
            norm = kernels.rms_norm_quantize if self.quantizes else kernels.rms_norm
            return norm(x, self.weight, self.eps)
        add_norm = kernels.add_rms_norm_quantize if self.quantizes else kernels.add_rms_norm
        stream.x, normed = add_norm(x, added, self.weight, self.eps)
        stream.added = None
        return normed


class FeedForward(nn.Module):
    """SwiGLU: w2(SiLU(w1 x) · w3 x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.w1 = make_linear(config, f"layers.{layer}.feed_forward.w1")
        self.w2 = make_linear(config, f"layers.{layer}.feed_forward.w2")
        self.w3 = make_linear(config, f"layers.{layer}.feed_forward.w3")

    def forward(self, x: LinearInput) -> Tensor:
        """[T, dim] to the same; in W8A8, by parts where all hidden numbers would be much memory."""
        if not isinstance(self.w2, LinearW8A8):
            return self.w2(self.gate(x))
        most = kernels.feed_forward_tokens(self.w2.weight_scale.device)
        return run_in_parts(self._forward_w8a8, x, most)

    def _forward_w8a8(self, x: LinearInput) -> Tensor:
        return self.w2(kernels.silu_mul_quantize(*run_linears(x, self.w1, self.w3)))

    def gate(self, x: LinearInput) -> Tensor:
        """SiLU(w1 x) · w3 x, [T, hidden_dim]: what w2 is given."""
        return kernels.silu_mul(*run_linears(x, self.w1, self.w3))


class Layer(nn.Module):
    """Attention, then feed-forward, each on the normed stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention, feed_forward = Attention(config, layer), FeedForward(config, layer)
        self.attention_norm = _norm_before(config, attention.wq, attention.wk, attention.wv)
        self.attention = attention
        self.ffn_norm = _norm_before(config, feed_forward.w1, feed_forward.w3)
        self.feed_forward = feed_forward

    def forward(
        self,
        stream: Stream,
        rotary: tuple[Tensor, Tensor],
        seqlens: Sequence[int],
        batch: PassPages | None,
        last: LastTokens | None = None,
    ) -> None:
        """Move the stream on, and leave in it what is wanted; as in `Attention.attend`."""
        normed = self.attention_norm.for_linears(stream)
        if last is not None:
            stream.x = stream.x[last.rows]
        if not len(stream.x):
            self.attention.attend(normed, rotary, seqlens, batch, last)  # which fills the cache
            return
        stream.added = self.attention(normed, rotary, seqlens, batch, last)
        normed = self.ffn_norm.for_linears(stream)
        stream.added = self.feed_forward(normed)


def _norm_before(config: ModelConfig, *linears: AnyLinear) -> RMSNorm:
    quantizes = all(isinstance(linear, LinearW8A8) for linear in linears)
    return RMSNorm(config.dim, config.norm_eps, quantizes)


class Transformer(nn.Module):
    """A decoder over packed sequences: tokens of several sequences end to end, no padding.

    Attributes:
        config: the architecture.
        mapped_bytes: of the weights that stay in their file, and take no memory of their own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.mapped_bytes = 0
        # Not `nn.Embedding(…)`: weights that are loaded need no random ones, and on the meta device
        # those import 900 modules of PyTorch's, which take 160 MB and a second.
        self.tok_embeddings = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.dim), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = make_linear(config, "output")
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        attention_pattern: str | None = None,
        softmax_fp32: bool = True,
        pack: bool = True,
        device: torch.device | str = CPU,
    ) -> Transformer:
        """Load a checkpoint in Mistral's or Hugging Face's layout; no tokenizer is needed.

        Args:
            path: a folder, a hub id, or `demo`.
            dtype: of the floating-point weights and of the computation; None keeps the file's.
            attention_pattern: as in `AttentionPattern.parse`, in place of the checkpoint's own.
            softmax_fp32: accepted for mistral-inference's callers; the softmax is always in fp32,
                which costs no memory here since it is taken in blocks.
            pack: whether int8 weights are brought into the form that is fast there, as `pack` does.
            device: where it runs, as in `choose_device`.

        Raises:
            CheckpointError, ConfigError: with the file and tensor at fault.
        """
        checkpoint = open_checkpoint(resolve_model(path), attention_pattern=attention_pattern)
        return cls.from_checkpoint(checkpoint, dtype, pack, choose_device(device))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype | str | None = None,
        pack: bool = True,
        device: torch.device = CPU,
    ) -> Transformer:
        """Load an opened checkpoint; on a CPU, weights that need no change stay memory-mapped."""
        with torch.device("meta"):
            model = cls(checkpoint.config)
        load_weights(model, checkpoint, dtype, pack, device)
        return model

    def with_weights(self, state: dict[str, Tensor]) -> Self:
        """This model with tensors by their names, taken as they lie in memory and not copied."""
        if self.config.tied_embeddings:
            # One parameter: two of the same memory would be two copies on another device.
            shared = nn.Parameter(state["tok_embeddings.weight"], requires_grad=False)
            state = state | {"tok_embeddings.weight": shared, "output.weight": shared}
        self.load_state_dict(state, strict=True, assign=True)
        return self.requires_grad_(False).eval()

    def pack(self) -> Self:
        """Bring int8 weights into the form that is fast on this machine; their `weight` is gone."""
        pack_linears(self)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def new_cache(self, capacity: int, kv_cache_dtype: str = "auto") -> RaggedCache:
        """An empty cache for one sequence of at most `capacity` tokens, with pages of its own."""
        return self.new_caches(1, capacity, kv_cache_dtype)[0]

    def new_caches(
        self, count: int, capacity: int, kv_cache_dtype: str = "auto", chunk: int | None = None
    ) -> list[RaggedCache]:
        """Empty caches for sequences of at most `capacity` tokens each, which may run together.

        Args:
            count: of sequences.
            capacity: tokens of each.
            kv_cache_dtype: of keys and values: `auto` (the model's), `bf16` or `int8`.
            chunk: the most tokens that a pass brings a sequence, beside which windowed layers keep
                their window only; None is any number.
        """
        layout = CacheLayout.of(self.config, kv_dtype(kv_cache_dtype, self.dtype))
        n_pages = count * layout.pages_needed(capacity, min(chunk or capacity, capacity))
        pool = PagePool(layout, n_pages, self.device, enable_prefix_caching=False)
        return [RaggedCache(pool, capacity) for _ in range(count)]

    def hidden(
        self,
        input_ids: Tensor,
        seqlens: Sequence[int],
        cache: Sequence[RaggedCache] | None = None,
        n_outputs: Sequence[int] | None = None,
    ) -> Tensor:
        """The last layer's normed output of each token that it is wanted of.

        To check the ids is to read them, for which the host waits if they are on a GPU already.

        Args:
            input_ids, seqlens, cache: as in `forward`.
            n_outputs: [B], of how many of each sequence's last tokens it is wanted; None: of all.

        Returns:
            [T, dim], or [sum of n_outputs, dim].
        """
        self._check(input_ids, seqlens, cache, n_outputs)
        input_ids = to_device(input_ids, self.device)
        last = None
        if n_outputs is not None and list(n_outputs) != list(seqlens):
            last = LastTokens(n_outputs, seqlens, self.device)
        if cache is None:
            positions = torch.cat([torch.arange(n, device=self.device) for n in seqlens])
            return self.run(input_ids, positions, seqlens, None, last)
        batch = PagedBatch(cache, seqlens)
        positions = to_device(batch.positions, self.device)
        with kernels.reuse_memory(self.device):
            hidden = self.run(input_ids, positions, seqlens, batch, last)
        batch.commit()
        return hidden

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        seqlens: Sequence[int],
        batch: PassPages | None,
        last: LastTokens | None = None,
    ) -> Tensor:
        """The layers alone: nothing is checked, and the host waits for nothing.

        Args:
            input_ids, positions: [T] integers on the model's device.
            seqlens: [B], tokens of each sequence.
            batch: their pages; None for whole sequences that are not kept.
            last: the tokens whose output is wanted; None for all.

        Returns:
            The last layer's normed output of each, [T, dim] or [R, dim].
        """
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return self.run_layers(self._embed(input_ids), rotary, seqlens, batch, last)

    def _embed(self, input_ids: Tensor) -> Tensor:
        weight = self.tok_embeddings.weight
        x = kernels.empty((len(input_ids), weight.shape[1]), weight.dtype, weight.device)
        return torch.index_select(weight, 0, input_ids, out=x)

    def run_layers(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        seqlens: Sequence[int],
        batch: PassPages | None,
        last: LastTokens | None = None,
    ) -> Tensor:
        """The same, of embeddings [T, dim] and the angles of their positions."""
        stream = Stream(x)
        del x
        for i, layer in enumerate(self.layers):
            is_last = i + 1 == self.config.n_layers
            layer(stream, rotary, seqlens, batch, last if is_last else None)
        if not len(stream.x):
            return stream.x
        normed = self.norm.for_linears(stream)
        assert isinstance(normed, Tensor)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, dim] to fp32 [T, vocab_size]; ask only for the rows that are needed."""
        return self.output(hidden).float()

    def forward(
        self,
        input_ids: Tensor,
        seqlens: Sequence[int],
        cache: Sequence[RaggedCache] | None = None,
    ) -> Tensor:
        """Logits of every token.

        Args:
            input_ids: [T] integers, the sequences' new tokens one after another, on the CPU or
                the model's device.
            seqlens: [B], how many tokens each sequence brings; sums to T.
            cache: [B], one `RaggedCache` a sequence, all of one pool: the tokens go on from what
                it holds and are added to it. None is one plain causal pass.

        Returns:
            [T, vocab_size] fp32.

        Raises:
            RequestError: lengths that do not add up, ids outside the vocabulary, a full cache.
        """
        with current(self.device):
            return self.logits(self.hidden(input_ids, seqlens, cache))

    def _check(
        self,
        input_ids: Tensor,
        seqlens: Sequence[int],
        cache: Sequence[RaggedCache] | None,
        n_outputs: Sequence[int] | None,
    ) -> None:
        if input_ids.dim() != 1 or input_ids.numel() == 0:
            raise RequestError(f"input_ids must be [T] with T > 0, not {list(input_ids.shape)}")
        if min(seqlens, default=0) <= 0 or sum(seqlens) != input_ids.numel():
            raise RequestError(
                f"seqlens {list(seqlens)} must be positive and add up to the "
                f"{input_ids.numel()} tokens of input_ids"
            )
        low, high = map(int, input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(
                f"token ids must be in 0…{self.config.vocab_size - 1}; found {low}…{high}"
            )
        if cache is not None and len(cache) != len(seqlens):
            raise RequestError(f"{len(cache)} caches for {len(seqlens)} sequences")
        if n_outputs is not None and not (
            len(n_outputs) == len(seqlens)
            and all(0 <= n <= length for n, length in zip(n_outputs, seqlens, strict=True))
        ):
            raise RequestError(
                f"n_outputs {list(n_outputs)} must be of each sequence from 0 to its tokens, "
                f"{list(seqlens)}"
            )
