"""The product of two int8 matrices, exact: where need be in fp32 arithmetic.

On CPUs without VNNI, `torch._int_mm` is a plain loop. A weight of 12,288 x 4096 takes it 17 ms for
one row of inputs, 34 ms for two, 45 s for 2048; in fp32 that is 14 to 18 ms, 22 ms and 1.5 s (AMD
EPYC without AVX-512, 2 cores). So no number of rows is left to the loop.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.kernels import reference

EXACT_INPUTS = 1024  # 128 · 128 · 1024 = 2**24: up to there fp32 holds every integer
BLOCK_ELEMENTS = 2**20  # of a weight, cast at a time: 4 MiB in fp32 stay in cache


def row_blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Runs of a weight's rows that hold about `BLOCK_ELEMENTS` elements each."""
    size = max(1, BLOCK_ELEMENTS // n_columns)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def int8_product_fp32(q: Tensor, weight: Tensor) -> Tensor:
    """As `octavo.kernels.reference.int8_product`, same arguments: fp32 sums of 1024, int32 beyond.

    Every product of two int8 numbers is at most 2**14, so a sum of 1024 is exact in any order. What
    one such sum holds is given back as it is, in fp32.
    """
    n_rows, in_features = weight.shape
    inputs = q.float()
    if in_features <= EXACT_INPUTS and weight.numel() <= BLOCK_ELEMENTS:
        return inputs @ weight.float().t()
    out = torch.zeros(q.shape[0], n_rows, dtype=torch.int32, device=q.device)
    for start in range(0, in_features, EXACT_INPUTS):
        columns = slice(start, min(start + EXACT_INPUTS, in_features))
        for rows in row_blocks(n_rows, columns.stop - columns.start):
            out[:, rows] += (inputs[:, columns] @ weight[rows, columns].float().t()).int()
    return out


def _has_vnni() -> bool:
    """Whether the CPU multiplies int8 by itself. The name is PyTorch's own, so it may go away."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())


_on_cpu = reference.int8_product if _has_vnni() else int8_product_fp32


def int8_product(q: Tensor, weight: Tensor) -> Tensor:
    """As `octavo.kernels.reference.int8_product`, same arguments, of any shape on any device.

    A GPU's `torch._int_mm` does not take few rows, nor numbers of columns that 8 does not divide.
    """
    return _on_cpu(q, weight) if q.device.type == "cpu" else int8_product_fp32(q, weight)
