"""A model whose layers stay on disk: one is in memory at a time.

For what must run in a fraction of a model's size and can wait: each pass reads every weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from octavo.checkpoint import Checkpoint
from octavo.model.linear import pack_linears
from octavo.model.transformer import Layer, Transformer


def load_layer(checkpoint: Checkpoint, index: int, dtype: torch.dtype | None = None) -> Layer:
    """One layer of a checkpoint; weights in their file's dtype stay memory-mapped.

    Args:
        checkpoint: any.
        index: the layer's number.
        dtype: of floating-point weights; None keeps the file's.
    """
    with torch.device("meta"):
        layer = Layer(checkpoint.config, index)
    prefix = f"layers.{index}."
    state = checkpoint.load(dtype, prefix)
    own_names = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    layer.load_state_dict(own_names, strict=True, assign=True)
    return layer.requires_grad_(False).eval()


class StreamedLayers(nn.Module):
    """A checkpoint's layers, each read when its turn comes and let go after it."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._dtype = dtype

    def __iter__(self) -> Iterator[Layer]:
        for index in range(self._checkpoint.config.n_layers):
            layer = load_layer(self._checkpoint, index, self._dtype)
            pack_linears(layer)
            yield layer


def streamed_transformer(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a checkpoint, with its layers left on disk.

    Args:
        checkpoint: any.
        dtype: of floating-point weights and the computation; None keeps the file's.
    """
    dtype = dtype or checkpoint.dtype
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    model.layers = StreamedLayers(checkpoint, dtype)  # type: ignore[assignment]
    state = {
        name: tensor
        for part in ("tok_embeddings.", "norm.", "output.")
        for name, tensor in checkpoint.load(dtype, part).items()
    }
    return model.with_weights(state)
