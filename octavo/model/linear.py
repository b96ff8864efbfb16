"""The two kinds of linear layer: floating point, and W8A8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import kernels
from octavo.config import ModelConfig


class Linear(nn.Module):
    """y = x weightᵀ in the weight's own dtype; no Mistral model has a bias.

    Attributes:
        weight: [out_features, in_features], bf16, fp16 or fp32.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        return F.linear(x, self.weight)


class LinearW8A8(nn.Module):
    """int8 weights with a scale per output channel, int8 activations with one per token.

    Attributes:
        weight: [out_features, in_features] int8.
        weight_scale: [out_features] fp32.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features], in x's dtype."""
        return kernels.linear_w8a8(x, self.weight, self.weight_scale)


def make_linear(config: ModelConfig, name: str) -> Linear | LinearW8A8:
    """The linear with this name: W8A8 where the checkpoint says so, floating point elsewhere."""
    out_features, in_features = config.linear_shape(name)
    if config.quantization is not None and name in config.quantization.linears:
        return LinearW8A8(in_features, out_features)
    return Linear(in_features, out_features)
