"""One decoder layer, quantised in the order in which the data meets its linears.

Each linear is calibrated on what the linears before it, already quantised, really give it: those of
the same layer included. The layer's own outputs become the next layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.model.transformer import Layer
from octavo.quantize.activations import Activations, Chunk, Derived
from octavo.quantize.linears import LinearQuantizer

# How often `quantize_layer` goes through the calibration samples, and through all of them.
PASSES_CALIBRATION, PASSES_ALL = 4, 2

Angles = Callable[[Chunk], tuple[Tensor, Tensor]]


def quantize_layer(
    layer: Layer,
    index: int,
    quantizer: LinearQuantizer,
    source: Activations,
    target: Activations,
    chunks: Sequence[Chunk],
    angles: Angles,
    room: int,
) -> None:
    """Quantise a layer in place, and run all samples through it.

    Args:
        layer: in floating point.
        index: its number.
        quantizer: takes what is to be written, and the reports.
        source: the residual stream that enters the layer, [n_tokens, dim].
        target: takes the stream that leaves it.
        chunks: all of the stream, held-out samples included.
        angles: cos and sin of a chunk's positions.
        room: bytes in which inner activations may be kept; those that do not fit are computed
            whenever they are asked for.
    """
    attention, feed_forward = layer.attention, layer.feed_forward
    prefix = f"layers.{index}."
    device = layer.attention_norm.weight.device
    n_tokens = chunks[-1].rows.stop

    def residual(chunk: Chunk, stream: Activations = source) -> Tensor:
        return stream.read(chunk.rows).to(device)

    def derive(compute: Callable[[Chunk], Tensor], width: int) -> Derived:
        dtype = layer.attention_norm.weight.dtype
        n_bytes = n_tokens * width * dtype.itemsize
        if n_bytes > room:
            return Derived(compute, None)
        return Derived(compute, torch.empty(n_tokens, width, dtype=dtype, device=device))

    quantizer.quantize(
        attention,
        ("wq", "wk", "wv"),
        f"{prefix}attention.",
        lambda chunk: layer.attention_norm(residual(chunk)),
        quantizer.norm_smoother(layer.attention_norm),
    )
    heads = derive(
        lambda chunk: attention.attend(
            layer.attention_norm(residual(chunk)), angles(chunk), chunk.seqlens, None
        ),
        attention.n_heads * attention.head_dim,
    )
    quantizer.quantize(
        attention,
        ("wo",),
        f"{prefix}attention.",
        heads,
        quantizer.row_smoother(
            attention.wv,
            f"{prefix}attention.wv",
            heads,
            shared=attention.n_heads // attention.n_kv_heads,
            run=attention.head_dim,
        ),
    )
    for chunk in chunks:
        target.write(chunk.rows, residual(chunk) + attention.wo(heads(chunk)))
        quantizer.tick(chunk.n_tokens)
    del heads

    quantizer.quantize(
        feed_forward,
        ("w1", "w3"),
        f"{prefix}feed_forward.",
        lambda chunk: layer.ffn_norm(residual(chunk, target)),
        quantizer.norm_smoother(layer.ffn_norm),
    )
    hidden = derive(
        lambda chunk: feed_forward.gate(layer.ffn_norm(residual(chunk, target))),
        quantizer.config.hidden_dim,
    )
    quantizer.quantize(
        feed_forward,
        ("w2",),
        f"{prefix}feed_forward.",
        hidden,
        quantizer.row_smoother(feed_forward.w3, f"{prefix}feed_forward.w3", hidden),
    )
    for chunk in chunks:
        target.write(chunk.rows, residual(chunk, target) + feed_forward.w2(hidden(chunk)))
        quantizer.tick(chunk.n_tokens)
    for norm in ("attention_norm", "ffn_norm"):
        weight = getattr(layer, norm).weight.to(quantizer.dtype)
        quantizer.tensors[f"{prefix}{norm}"] = {"weight": weight}
