"""Nucleus sampling's choice: the likeliest tokens that together reach a probability."""

from __future__ import annotations

from torch import Tensor

from octavo.kernels.long_rows import largest

CANDIDATES = (256, 4096)  # the likeliest, among which a CPU looks before it sorts all


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman 2020).

    Args:
        weights: [R, vocab_size] fp32, in proportion to probabilities. Of the others they become 0,
            in place.
        top_p: [R, 1] fp32, above 0; 1 keeps all.

    Returns:
        weights.
    """
    total = weights.sum(-1, keepdim=True)
    n_tokens = weights.shape[1]
    # On a CPU sorting 131,072 numbers takes 15 ms. Elsewhere the host would have to wait to know
    # whether a few do.
    few = CANDIDATES if weights.device.type == "cpu" else ()
    for count in (*(n for n in few if n < n_tokens), n_tokens):
        values, ids = largest(weights, count)
        probabilities = values / total
        sums = probabilities.cumsum(-1)
        if count < n_tokens and bool(((sums[:, -1:] >= top_p) | (top_p == 1)).all()):
            break
    # A token stays if those before it have not reached top_p yet; so the first always stays.
    is_whole = top_p == 1
    values = values.masked_fill((sums - probabilities >= top_p) & ~is_whole, 0.0)
    return weights.mul_(is_whole.float()).scatter_(-1, ids, values)
