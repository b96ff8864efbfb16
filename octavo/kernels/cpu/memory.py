"""Memory that a token reads from end to end: packed weights, and pages of keys and values.

It begins with a huge page of the system, which Linux is asked for: a processor then looks up fewer
addresses, and reads weights by 1 to 10 % faster (two cores of an AMD EPYC). And no run of a page's
tokens lies across two of the system's small pages, beyond which a processor does not look ahead:
attention over 131,072 keys in int8 is 14 % faster for it.

It comes of the system and not of the C library, which would give what others have let go of, write
zeros into all of it, and have holes of megabytes between what is left.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import numpy as np
import torch
from torch import Tensor

SMALL_PAGE, HUGE_PAGE = 4 << 10, 2 << 20  # bytes


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that the system hands out page by page as they are written.

    Raises:
        MemoryError: there is not as much.
    """
    n_bytes = prod(shape) * dtype.itemsize
    page = HUGE_PAGE if n_bytes >= HUGE_PAGE else SMALL_PAGE
    try:
        # What is left over is never written.
        mapped = mmap.mmap(-1, n_bytes + page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{n_bytes} bytes") from error
    memory = np.frombuffer(mapped, np.uint8)
    start = -memory.ctypes.data % page
    if page == HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a system without them
            # Without what is left over: of a last huge page, a byte that is written is all of it.
            mapped.madvise(mmap.MADV_HUGEPAGE, start, n_bytes)
    return torch.from_numpy(memory[start : start + n_bytes]).view(dtype).view(tuple(shape))
