"""Scales between two linears that make int8 rounding of inputs and weights cost the least.

SmoothQuant's formula looks at the largest values alone. Here the expected squared error of the
outputs is written down and minimised over the scales s. Rounding to steps of d adds noise of
variance d² / 12, so with x' = x / s rounded to a scale a token and W' = W diag(s) to one a row,

    E ∝ Σ_t max_j (x_tj / s_j)² · Σ_j s_j² ‖w_j‖²  +  Σ_i max_j (w_ij s_j)² · Σ_t Σ_j (x_tj / s_j)²,

the inputs' noise through the weights and the weights' noise through the inputs. Every factor is
convex in log s, and so is log E.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 50
RATE = 0.15  # of log s a step, at first
BETAS = (0.9, 0.99)  # of Adam (Kingma & Ba 2015)
CANDIDATES = 16  # inputs of a token that may become its largest
MOST_ROWS = 256  # of the weight, which stand for all
TINY = 1e-20


def least_noise_scales(x: Tensor, weight: Tensor) -> Tensor:
    """The scales that minimise E.

    Args:
        x: [T, K], inputs of all kinds: what none of these tokens has large may be scaled up.
            Each counts by its error relative to its own size, since the norms of a transformer see
            no other.
        weight: [N, K] fp32.

    Returns:
        [K] fp32, positive, with a geometric mean of 1; all 1 where every product is 0.
    """
    x2 = x.float().square()
    x2 /= x2.sum(1, keepdim=True).clamp_min(TINY)
    tokens = x2.sum(0)  # [K]
    x2, inputs_of = x2.topk(min(CANDIDATES, x2.shape[1]), 1)  # [T, CANDIDATES] each
    columns = weight.square().sum(0)  # [K]
    w2 = weight[:: max(1, weight.shape[0] // MOST_ROWS)].square()
    columns *= w2.shape[0] / weight.shape[0]  # as if those rows were all
    log_s = torch.zeros_like(columns)
    if not (tokens.any() and columns.any()):  # no noise to be lessened, and 0 / 0 below
        return log_s.exp()
    mean, variance = torch.zeros_like(log_s), torch.zeros_like(log_s)
    for step in range(STEPS):
        s2 = (2 * log_s).exp()
        largest_x, at_x = (x2 / s2[inputs_of]).max(1)
        at_x = inputs_of.gather(1, at_x[:, None])[:, 0]
        largest_w, at_w = (w2 * s2).max(1)
        through_weights, through_inputs = columns * s2, tokens / s2
        sums = [v.sum() for v in (largest_x, through_weights, largest_w, through_inputs)]
        of_inputs, of_weights = sums[0] * sums[1], sums[2] * sums[3]
        # d log(sum) / d log s (halved); those of the two factors of a product add up.
        by_inputs = (through_weights / sums[1]).index_add(0, at_x, -largest_x / sums[0])
        by_weights = (-through_inputs / sums[3]).index_add(0, at_w, largest_w / sums[2])
        gradient = (of_inputs * by_inputs + of_weights * by_weights) / (of_inputs + of_weights)
        mean.lerp_(gradient, 1 - BETAS[0])
        variance.lerp_(gradient.square(), 1 - BETAS[1])
        direction = mean / (1 - BETAS[0] ** (step + 1))
        direction /= (variance / (1 - BETAS[1] ** (step + 1))).sqrt() + TINY
        log_s -= RATE * (1 - step / STEPS) * direction
    return (log_s - log_s.mean()).exp()
