"""GPTQ: round a matrix column by column, each column making up for the errors of those before it.

Frantar et al. 2022 round the columns in a fixed order and, after each, move the others by the
inverse Hessian. With H = AᵀA, A upper triangular, the same weights come out of Babai's nearest
plane algorithm run from the last column to the first (Chen et al. 2025, "The Geometry of LLM
Quantization"). For E = W - Ŵ the error is tr(E H Eᵀ) = ‖A Eᵀ‖², and row i of A Eᵀ would be zero if
column i could be

    ŵ_i = round(w_i + Σ_{j>i} A_ij (w_j - ŵ_j) / A_ii).

That takes one Cholesky factorisation, where the usual form takes a factorisation, an inverse, and
the factorisation of the inverse. `gptq_reference` is the usual form, for the tests.

What a column should be may lie beyond the grid's end, and so few numbers has a grid of 4 bits that
it does: then the columns after it are asked for more and more, and the row may end up worse than
plainly rounded. `keep_better_rows` sees to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quantize.grid import WeightGrid

BLOCK = 128  # columns rounded one by one; the sums over columns beyond it are one matrix product
SLAB = 8192  # rows at a time, to bound memory: a row's rounding does not depend on the others
COMPARED = 2048  # rows at a time whose errors are compared, with more matrices of them in memory
LEAST_DAMPENING, MOST_DAMPENING = 1e-6, 1e3  # between which more of it is tried


@dataclass(frozen=True)
class Factorization:
    """A Hessian H, dampened and factorised; it serves all linears with the same inputs.

    Attributes:
        upper: [K, K] fp32, A of H = AᵀA, with rows and columns in `order`.
        order: [K], the columns by how much they matter, the least first.
        dampening_frac: of the mean diagonal, added to the diagonal.
    """

    upper: Tensor
    order: Tensor
    dampening_frac: float


def factorize(hessian: Tensor, dampening_frac: float) -> Factorization:
    """Dampen and factorise a Hessian.

    Args:
        hessian: [K, K] fp32, the sum of x xᵀ over the inputs; not changed.
        dampening_frac: what to add. Where it does not suffice, ten times as much is tried, and so
            on: a singular Hessian (too few samples, inputs that are always zero) costs accuracy
            and not the run.
    """
    # Activation order: what matters most is rounded first, while all others can still make up for
    # it. Rounding runs from the last column to the first.
    order = hessian.diagonal().argsort(stable=True)
    matrix = hessian[order][:, order]
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:  # no input was ever anything but zero: plain rounding is as good as any
        identity = torch.eye(matrix.shape[0], device=matrix.device)
        return Factorization(identity, order, dampening_frac)
    added = 0.0
    while True:
        diagonal += (dampening_frac - added) * mean
        added = dampening_frac
        upper, failed = torch.linalg.cholesky_ex(matrix, upper=True)
        if not failed or dampening_frac > MOST_DAMPENING:
            return Factorization(upper, order, dampening_frac)
        dampening_frac = max(10 * dampening_frac, LEAST_DAMPENING)


def gptq(weight: Tensor, scale: Tensor, factorization: Factorization, grid: WeightGrid) -> Tensor:
    """Round a matrix so that its outputs change as little as can be.

    Args:
        weight: [N, K] fp32.
        scale: [N, G] fp32, as `WeightGrid.find_scales` gives them.
        factorization: of the Hessian of its inputs.
        grid: the numbers to round to.

    Returns:
        [N, K] in the grid's dtype.
    """
    n_rows, n_columns = weight.shape
    order = factorization.order
    back = order.argsort()
    groups = (order // (n_columns // scale.shape[1])).tolist()  # of each column, in this order
    rounded = torch.empty(n_rows, n_columns, dtype=grid.dtype, device=weight.device)
    for start in range(0, n_rows, SLAB):
        rows = slice(start, start + SLAB)
        columns = weight[rows].t()[order]  # a column of W in one piece
        _round_columns(columns, scale[rows].t().contiguous(), groups, factorization.upper, grid)
        rounded[rows] = columns[back].t().to(grid.dtype)
    return rounded


def keep_better_rows(
    weight: Tensor, rounded: Tensor, scale: Tensor, hessian: Tensor, grid: WeightGrid
) -> int:
    """Put plain rounding in place of the rows whose outputs it changes less.

    With E and P the errors of the rows as they are and plainly rounded, the difference of what they
    cost is, row by row, e H eᵀ - p H pᵀ = (e - p) H (e + p)ᵀ: one product in place of two.

    Args:
        weight: [N, K] fp32.
        rounded: [N, K], by `gptq`; changed in place.
        scale: [N, G] fp32.
        hessian: [K, K] fp32, symmetric: of the inputs themselves, without dampening.
        grid: that `rounded` is on.

    Returns:
        How many rows were changed.
    """
    n_changed = 0
    for start in range(0, weight.shape[0], COMPARED):
        rows = slice(start, start + COMPARED)
        plain = grid.round_matrix(weight[rows], scale[rows])
        error = _errors(weight[rows], rounded[rows], scale[rows])
        error_of_plain = _errors(weight[rows], plain, scale[rows])
        difference = ((error - error_of_plain) @ hessian).mul_(error.add_(error_of_plain)).sum(1)
        worse = difference > 0
        rounded[rows][worse] = plain[worse]
        n_changed += int(worse.sum())
    return n_changed


def gptq_reference(
    weight: Tensor, scale: Tensor, hessian: Tensor, grid: WeightGrid, dampening_frac: float
) -> Tensor:
    """As `gptq`, in the form of the paper (eq. 2 and 3) and in float64; one column at a time."""
    weight, hessian, scale = weight.double(), hessian.double().clone(), scale.double()
    hessian.diagonal().add_(dampening_frac * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian)
    remaining = weight.clone()
    rounded = torch.empty_like(weight)
    group_size = weight.shape[1] // scale.shape[1]
    for column in hessian.diagonal().argsort(stable=True).flip(0).tolist():
        step = scale[:, column // group_size]
        rounded[:, column] = grid.round(remaining[:, column], step)
        error = (remaining[:, column] - rounded[:, column] * step) / inverse[column, column]
        remaining -= torch.outer(error, inverse[column])
        # Leave this column out of the inverse: one step of Gaussian elimination.
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return rounded.to(grid.dtype)


def _errors(weight: Tensor, rounded: Tensor, scale: Tensor) -> Tensor:
    """W - Ŵ, [N, K] fp32."""
    dequantized = rounded.float().view(*scale.shape, -1) * scale[..., None]
    return weight - dequantized.view_as(weight)


def _round_columns(
    columns: Tensor, scales: Tensor, groups: list[int], upper: Tensor, grid: WeightGrid
) -> None:
    """Babai's nearest plane, in place.

    Args:
        columns: [K, N] fp32, the transposed weights; takes the numbers of the grid.
        scales: [G, N] fp32.
        groups: [K], which scales each column takes.
        upper: [K, K] fp32.
    """
    unit = upper.diagonal()[:, None]
    errors = torch.empty_like(columns)
    for stop in range(columns.shape[0], 0, -BLOCK):
        start = max(0, stop - BLOCK)
        block = slice(start, stop)
        # What the columns already rounded ask of this block's, [block, N].
        carried = upper[block, stop:] @ errors[stop:]
        carried.div_(unit[block]).add_(columns[block])
        within = upper[block, block] / unit[block]
        for i in range(stop - start - 1, -1, -1):
            column, scale = start + i, scales[groups[start + i]]
            target = torch.addmv(carried[i], errors[column + 1 : stop].t(), within[i, i + 1 :])
            rounded = grid.round(target, scale)
            torch.addcmul(columns[column], rounded, scale, value=-1, out=errors[column])
            columns[column] = rounded
