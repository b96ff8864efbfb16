"""A copy of a model with activation outliers, for testing what a quantiser does with them.

Large models grow a few channels whose activations are a hundred times the others', and a scale a
token must cover them: the other channels are left with one or two of its 127 steps (Dettmers et al.
2022). A small model does not, but can be given them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

LINEARS_OF = {
    "attention_norm": ("attention.wq", "attention.wk", "attention.wv"),
    "ffn_norm": ("feed_forward.w1", "feed_forward.w3"),
}


def with_outliers(
    state: dict[str, Tensor], channels: Sequence[int], factor: float
) -> dict[str, Tensor]:
    """Scale channels of every norm's output up, and the weights that read them down.

    The function stays the same, and with a power of two as the factor every weight stays exact.

    Args:
        state: a model's tensors, by name in `octavo.model`; not changed.
        channels: of the residual stream.
        factor: how far.
    """
    outliers = {name: tensor.clone() for name, tensor in state.items()}
    index = list(channels)
    for name, tensor in outliers.items():
        prefix, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in LINEARS_OF:
            tensor[index] *= factor
            for linear in LINEARS_OF[kind]:
                outliers[f"{prefix}.{linear}.weight"][:, index] /= factor
    return outliers
