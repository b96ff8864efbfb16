"""What a change to a model costs: KL divergence from the original, and perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ logits) of each row's distribution, in nats.

    Args:
        reference, logits: [T, vocab_size], any float dtype; computed in fp64.

    Returns:
        [T] fp64.
    """
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@dataclass
class Divergence:
    """Sums over the tokens of texts, each predicted by an original model and by another.

    Attributes:
        n_tokens: predicted distributions that were compared.
        kl_sum: of their KL divergences, in nats.
        n_targets: tokens that had to be predicted: all but the first of each text.
        nll_reference, nll: sums of -log p(target), in nats, by the original and by the other.
    """

    n_tokens: int = 0
    kl_sum: float = 0.0
    n_targets: int = 0
    nll_reference: float = 0.0
    nll: float = 0.0

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Take in neighbouring tokens of one text.

        Args:
            reference, logits: [T, vocab_size].
            targets: [T] or, at the end of the text, [T - 1]: the tokens that follow.
        """
        self.n_tokens += reference.shape[0]
        self.kl_sum += float(kl_divergence(reference, logits).sum())
        n = targets.shape[0]
        self.n_targets += n
        cross_entropy = torch.nn.functional.cross_entropy
        self.nll_reference += float(cross_entropy(reference[:n].double(), targets, reduction="sum"))
        self.nll += float(cross_entropy(logits[:n].double(), targets, reduction="sum"))

    @property
    def kl(self) -> float:
        """Mean KL divergence, nats a token."""
        return self.kl_sum / self.n_tokens

    @property
    def perplexity_reference(self) -> float:
        return math.exp(self.nll_reference / self.n_targets)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.n_targets)
