"""Rows as long as a vocabulary, of which blocks are asked first.

PyTorch goes through a long row a number at a time where it looks for the place of a maximum, and
sorts all of it where a few are wanted.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers whose maximum or sum is taken first,
FEW = 32  # and of which the few greatest are looked for


def largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row in their order, and which they are, both [R, count].

    Few are looked for in the blocks whose maxima are greatest: there are no others elsewhere.
    """
    n_numbers = rows.shape[1]
    if count == n_numbers:
        values, ids = rows.sort(-1, descending=True)
    elif 4 * count * FEW > n_numbers:
        values, ids = rows.topk(count)
    else:
        blocks = blocks_of(rows, -1.0, FEW)
        chosen = blocks.amax(-1).topk(count).indices
        values, places = pick(blocks, chosen).topk(count)
        ids = chosen.gather(1, places // FEW) * FEW + places % FEW
    return values, ids


def blocks_of(rows: Tensor, filler: float, size: int = BLOCK) -> Tensor:
    """[R, n] as [R, n_blocks, size]."""
    if missing := -rows.shape[1] % size:
        rows = F.pad(rows, (0, missing), value=filler)
    return rows.unflatten(1, (-1, size))


def pick(blocks: Tensor, index: Tensor) -> Tensor:
    """Of each row the blocks with its indices, [R, n], one after another: [R, n · size]."""
    return blocks.gather(1, index[..., None].expand(-1, -1, blocks.shape[2])).flatten(1)
