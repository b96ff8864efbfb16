"""The numbers that a scheme's weights may take, and the scales that fit them to a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import kernels
from octavo.kernels.quantized import FP8_DTYPE
from octavo.schemes import FP8_MAX, Scheme

SLAB = 2048  # rows rounded, or searched for their scales, at a time, to bound memory
# How far below its largest weight a row's scale is looked for, by the bits of its grid: few
# numbers make it worth more to cut off an outlier.
LEAST_CLIPPING = {8: 0.8, 4: 0.5}
CANDIDATES = 16


class WeightGrid:
    """Rounds the weights of one scheme.

    Attributes:
        scheme: the scheme.
        scale_dtype: dtype that scales are stored in. They are rounded to it before any weight is,
            so that storing them costs nothing.
        dtype: of weights on the grid: int8 or float8.
    """

    def __init__(self, scheme: Scheme, scale_dtype: torch.dtype) -> None:
        self.scheme = scheme
        self.scale_dtype = scale_dtype
        self.dtype = torch.int8 if scheme.weight_type == "int" else FP8_DTYPE
        self._low, self._high = scheme.weight_range

    def find_scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """A scale for each row, or for each group of a row.

        Args:
            weight: [N, K] fp32.
            importance: [K] fp32, what a squared error of each input's weights costs: the diagonal
                of the Hessian. The scale is the one with the least weighted squared error of plain
                rounding. None takes the largest weight of the row and cuts nothing off.

        Returns:
            [N, G] fp32, G scales a row; a scheme with one scale a tensor repeats it.
        """
        n_rows, n_inputs = weight.shape
        grouped = weight.view(n_rows, self.scheme.n_groups(n_inputs), -1)
        largest = torch.maximum(grouped.amax(-1), -grouped.amin(-1))  # no |W| as large as W
        if self.scheme.weight_strategy == "tensor":
            largest = largest.amax().expand_as(largest)
        scale = self._storable(largest * (2 / (self._high - self._low)))
        if importance is None or self.scheme.weight_type == "float":
            return scale  # a float grid is as fine for small weights as for large ones
        return torch.cat(
            [
                self._search(weight[start : start + SLAB], scale[start : start + SLAB], importance)
                for start in range(0, n_rows, SLAB)
            ]
        )

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """The nearest numbers of the grid, as fp32; `scale` broadcasts to `values`."""
        scaled = values / scale
        if self.scheme.weight_type == "int":
            return scaled.round_().clamp_(self._low, self._high)
        return scaled.clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).float()

    def round_matrix(self, weight: Tensor, scale: Tensor) -> Tensor:
        """[N, K] fp32 rounded to the nearest with scales [N, G]; [N, K] in the grid's dtype."""
        rounded = torch.empty_like(weight, dtype=self.dtype)
        for start in range(0, weight.shape[0], SLAB):
            rows = slice(start, start + SLAB)
            grouped = weight[rows].view(*scale[rows].shape, -1)
            rounded[rows] = self.round(grouped, scale[rows][..., None]).flatten(1)
        return rounded

    def stored(self, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """The tensors of one linear as compressed-tensors has them on disk.

        Args:
            weight: [N, K] in the grid's dtype.
            scale: [N, G] fp32.
        """
        shape = self.scheme.scale_shape(*weight.shape)
        scale = (scale[:1, 0] if shape == (1,) else scale).to(self.scale_dtype).contiguous()
        if not self.scheme.packed:
            return {"weight": weight.contiguous(), "weight_scale": scale}
        return {
            "weight_packed": kernels.pack_int4(weight),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }

    def _search(self, weight: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
        """Per group the best of the plain scale and several others, [rows, G]."""
        grouped = weight.view(*scale.shape, -1)  # [rows, G, K / G]
        cost = importance.view(scale.shape[1], -1)
        best = scale.clone()
        least = torch.full_like(scale, float("inf"))
        # Begin where even a positive largest weight is met: of -8 to 7, the plain scale, 2 / 15 of
        # that weight, meets neither end.
        most = (self._high - self._low) / (2 * self._high)
        factors = torch.linspace(most, LEAST_CLIPPING[self.scheme.weight_bits], CANDIDATES)
        for factor in dict.fromkeys([1.0, *factors.tolist()]):
            candidate = self._storable(scale * factor)
            rounded = self.round(grouped, candidate[..., None]).mul_(candidate[..., None])
            error = rounded.sub_(grouped).square_().mul_(cost).sum(-1)
            better = error < least
            best[better], least[better] = candidate[better], error[better]
        return best

    def _storable(self, scale: Tensor) -> Tensor:
        """Rounded to the dtype on disk; a row of zeros, or too small for it, gets scale 1."""
        scale = scale.to(self.scale_dtype).float()
        return torch.where(scale > torch.finfo(self.scale_dtype).tiny, scale, 1.0)
