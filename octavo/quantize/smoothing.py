"""SmoothQuant: move the inputs' outliers into the weights, where a scale a row can hold them.

Xiao et al. 2022: Y = (X diag(s)⁻¹) (diag(s) W). The division is folded into what makes the inputs,
so that nothing is added when the model runs: into the norm before the linears, as in the paper, or
into the scales of the rows of the linear before, which is quantised already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from octavo.model.linear import QuantizedLinear
from octavo.model.transformer import RMSNorm
from octavo.quantize.activations import Derived
from octavo.quantize.noise import least_noise_scales


def smoothing_scales(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """s = max|x|^strength / max|w|^(1 - strength) for each input (eq. 4).

    Args:
        largest: [K], the largest |x| of each input.
        weights: [N, K] each, of all linears that share the input.
        strength: 0 to 1.

    Returns:
        [K] fp32; 1 for inputs that are always zero, or that no weight uses.
    """
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scales = largest.pow(strength) / columns.pow(1 - strength)
    usable = (largest > 0) & (columns > 0) & scales.isfinite() & (scales > 0)
    return torch.where(usable, scales, 1.0)


class NormSmoother:
    """Divides what a norm gives.

    Args:
        norm: its weight is changed.
        strength: SmoothQuant's alpha.
        dtype: of the norm's weight on disk.
    """

    def __init__(self, norm: RMSNorm, strength: float, dtype: torch.dtype) -> None:
        self.norm = norm
        self.strength = strength
        self.dtype = dtype

    def smooth(self, largest: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Divide, and give the scales [K] of it; arguments as in `smoothing_scales`.

        The norm's new weight has to be rounded to its dtype. The scales are adjusted by that
        rounding, so that norm and linears together still compute the same function, to fp32.
        """
        scales = smoothing_scales(largest, weights, self.strength)
        norm = self.norm.weight.float()
        smoothed = (norm / scales).to(self.dtype).float()
        exact = norm / smoothed
        usable = exact.isfinite() & (exact > 0)  # 0 / 0, or a weight too small for the dtype
        weight = torch.where(usable, smoothed, norm).to(self.norm.weight.dtype)
        self.norm.weight = nn.Parameter(weight, requires_grad=False)
        return torch.where(usable, exact, 1.0)


class RowSmoother:
    """Divides what a linear gives to the next one, by dividing the scales of its rows.

    Between the two lies what passes a factor on: attention from wv to wo, the product with the gate
    from w3 to w2.

    Args:
        linear: the one before, quantised, with one scale a row or several.
        stored: its tensors as they go to disk.
        derived: the inputs of the next linear; those that are kept are computed anew.
        shared, run: how rows spread over inputs: each run of `run` rows makes `shared` runs of
            inputs, one after another, as key heads serve a group of query heads.
    """

    def __init__(
        self,
        linear: QuantizedLinear,
        stored: dict[str, Tensor],
        derived: Derived,
        shared: int = 1,
        run: int = 1,
    ) -> None:
        self.linear = linear
        self.stored = stored
        self.derived = derived
        self.shared, self.run = shared, run

    def smooth(self, sample: Tensor, weight: Tensor, error: Callable[[Tensor], float]) -> Tensor:
        """Divide, if that lessens the error, and give the scales [K] of it.

        Args:
            sample: [T, K], some inputs of the next linear.
            weight: [N, K] fp32, the next linear's.
            error: what plain rounding would cost with given scales [K].
        """
        scales = least_noise_scales(sample, weight)
        rows = scales.log().view(-1, self.shared, self.run).mean(1).flatten().exp()
        divided, rows = self._divided(rows)
        scales = self._spread(rows)
        if error(scales) >= error(torch.ones_like(scales)):
            return torch.ones_like(scales)
        self.stored["weight_scale"] = divided
        running = self.linear.weight_scale
        running.copy_(divided.float().view_as(running))
        self.derived.forget()
        return scales

    def _divided(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The new scales as they go to disk, and what, exactly, each row is divided by.

        A scale has to be rounded to its dtype. Where a row has but one, the divisor is adjusted by
        that rounding; where it has several they must agree, so the divisor is a power of two.
        """
        stored = self.stored["weight_scale"]
        if stored.shape[1] > 1:
            rows = rows.log2().round().exp2()
        divided = (stored.float() / rows[:, None]).to(stored.dtype)
        exact = stored.float() / divided.float()
        usable = (exact.isfinite() & (exact == exact[:, :1])).all(1)
        divided = torch.where(usable[:, None], divided, stored)
        return divided, torch.where(usable, exact[:, 0], 1.0)

    def _spread(self, rows: Tensor) -> Tensor:
        """Scales of rows as scales of the next linear's inputs."""
        return rows.view(-1, 1, self.run).expand(-1, self.shared, -1).flatten()
