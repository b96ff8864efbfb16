"""What calibration measures of a linear's inputs: the Hessian, and each input's largest value."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 2048  # rows of the Hessian updated at a time
MOST_SAMPLED = 4096  # rows of a sample
SAMPLE_ELEMENTS = 2**25  # and 128 MiB of them


class InputStatistics:
    """Sums over the inputs x of a linear.

    GPTQ minimises ‖W X − Ŵ X‖², whose Hessian for every row of Ŵ is 2 X Xᵀ (Frantar et al. 2022,
    section 3.1). The factor 2 changes nothing and is left out.

    Attributes:
        hessian: [K, K] fp32, the sum of x xᵀ. Only blocks on and above the diagonal are summed;
            `mirror` fills the others.
        largest: [K] fp32, the largest |x| of each input.
        n_tokens: how many x were seen.

    Args:
        n_inputs: K.
        n_expected: how many x there will be, so that a sample can be spread over them.
        device: where they are.
        with_hessian: whether it is wanted.
    """

    def __init__(
        self, n_inputs: int, n_expected: int, device: torch.device, with_hessian: bool = True
    ) -> None:
        self._stride = -(-n_expected // min(MOST_SAMPLED, SAMPLE_ELEMENTS // n_inputs))
        self._sampled: list[Tensor] = []
        shape = (n_inputs, n_inputs) if with_hessian else (0, 0)
        self.hessian = torch.zeros(shape, device=device)
        self.largest = torch.zeros(n_inputs, device=device)
        self.n_tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in [T, K]."""
        self._sampled.append(x[-self.n_tokens % self._stride :: self._stride].clone())
        x = x.float()
        self.n_tokens += x.shape[0]
        torch.maximum(self.largest, x.abs().amax(0), out=self.largest)
        # The matrix is symmetric: with several panels, near half of the products are not needed.
        for start in range(0, self.hessian.shape[0], PANEL):
            rows = x[:, start : start + PANEL]
            self.hessian[start : start + PANEL, start:].addmm_(rows.t(), x[:, start:])

    def sample(self, most: int = MOST_SAMPLED) -> Tensor:
        """At most about `most` of the x, spread evenly over all of them, [T, K]."""
        rows = torch.cat(self._sampled)
        return rows[:: -(-rows.shape[0] // most)]

    def mirror(self) -> None:
        """Fill everything below the diagonal."""
        n = self.hessian.shape[0]
        for start in range(0, n, PANEL):
            stop = min(start + PANEL, n)
            # A product adds up x_i x_j and x_j x_i in orders of its own: the last bits may differ.
            on_diagonal = self.hessian[start:stop, start:stop]
            on_diagonal.copy_(on_diagonal.triu() + on_diagonal.triu(1).t())
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].t()

    def divide(self, scale: Tensor) -> None:
        """The statistics that x / scale would have had; scale is [K]."""
        self._sampled = [(rows / scale).to(rows.dtype) for rows in self._sampled]
        self.largest /= scale
        if self.hessian.numel():
            self.hessian /= scale[:, None]
            self.hessian /= scale[None, :]
