"""The W8A8 linear on a CPU: which product it is, and the form that it wants its weight in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels import quantized
from octavo.kernels.cpu import linear, onednn, rows
from octavo.kernels.cpu.linear import PanelWeight
from octavo.kernels.cpu.onednn import OneDNNWeight
from octavo.kernels.quantized import QuantizedTokens

PackedWeight = PanelWeight | OneDNNWeight

# Tokens whose hidden numbers are in memory at a time: of the 8B model 16 MB, where a pass of 512
# tokens had 31 and one of 1,024 had 63. The weights are read again for each, which took 0.6 to
# 0.9 % of such passes; half of these tokens took 2 (two cores of an AMD EPYC, Zen 5).
FEED_FORWARD_TOKENS = 256


def pack_w8a8(weight: Tensor) -> PackedWeight | None:
    """A weight in the form that the fastest exact product on this machine wants.

    Args:
        weight: [N, K] int8.

    Returns:
        The packed weight, which is a copy; None where only the definition serves.
    """
    if PanelWeight.serves(weight) and linear.best_isa() is not None:
        return PanelWeight(weight)
    if OneDNNWeight.serves(weight) and onednn.usable():
        return OneDNNWeight(weight)
    return None


def linear_w8a8(
    x: Tensor | QuantizedTokens,
    weight: Tensor | PackedWeight,
    weight_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """As `octavo.kernels.quantized.linear_w8a8`, same arguments; the weight may be packed."""
    if isinstance(x, Tensor):
        x = rows.quantize_per_token(x)
    if isinstance(weight, Tensor):
        return quantized.linear_w8a8(x, weight, weight_scale, bias)
    if bias is None:
        return weight.multiply(x, weight_scale)
    in_fp32 = x._replace(dtype=torch.float32)  # rounded once, with the bias
    return weight.multiply(in_fp32, weight_scale).add_(bias).to(x.dtype)


def linears_w8a8(
    x: Tensor | QuantizedTokens,
    weights: Sequence[Tensor | PackedWeight],
    weight_scales: Sequence[Tensor],
) -> list[Tensor]:
    """As `octavo.kernels.quantized.linears_w8a8`; in panels, the threads meet once for all."""
    if isinstance(x, Tensor):
        x = rows.quantize_per_token(x)
    panels = [weight for weight in weights if isinstance(weight, PanelWeight)]
    if panels and len(panels) == len(weights):
        return linear.multiply_all(x, panels, weight_scales)
    return [linear_w8a8(x, *each) for each in zip(weights, weight_scales, strict=True)]
