"""The machine's own rates, by the C++ library (`native/machine.cpp`): what kernels are held to."""

from __future__ import annotations

import ctypes
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from octavo.kernels.cpu import library as native
from octavo.kernels.cpu import memory
from octavo.kernels.timing import best_seconds

READ_BYTES = 2**29  # far more than any cache that a few threads share
STREAMS = (1, 3, 6)  # that a thread reads at once; not powers of two, which meet in the same banks
_ROUNDS = 2**20  # of int8 arithmetic: tens of milliseconds


def read_bytes_per_second(n_bytes: int = READ_BYTES) -> float:
    """The rate at which all of PyTorch's threads together read memory, each a part of its own.

    The best of several ways: a thread may read one run of memory or a few side by side.

    Args:
        n_bytes: of memory that is taken for it, a multiple of 8.
    """
    buffer = memory.zeros((n_bytes,), torch.uint8).fill_(1)  # or it would be no memory yet
    return n_bytes / min(best_seconds(partial(_read, buffer, n_streams)) for n_streams in STREAMS)


class Reads:
    """Memory that is read between other work, whose rate is to be held against this one's.

    Machines change their pace from one second to the next: two rates are comparable if they were
    taken in turn.

    Args:
        buffer: what is read; at most READ_BYTES of it.
    """

    def __init__(self, buffer: Tensor) -> None:
        n_bytes = min(buffer.nbytes, READ_BYTES) // 8 * 8
        self._buffer = buffer.view(-1).view(torch.uint8)[:n_bytes]
        self._seconds: dict[int, list[float]] = {n_streams: [] for n_streams in STREAMS}

    def read(self) -> None:
        """Once in each way, as in `read_bytes_per_second`."""
        for n_streams, seconds in self._seconds.items():
            started = time.perf_counter()
            _read(self._buffer, n_streams)
            seconds.append(time.perf_counter() - started)

    def bytes_per_second(self) -> float:
        """By the median of the way that is fastest."""
        return self._buffer.nbytes / min(map(statistics.median, self._seconds.values()))


def _read(buffer: Tensor, n_streams: int) -> None:
    """Read a buffer by all of PyTorch's threads, each `n_streams` runs of it at once."""
    library = native.load()
    if library is None:
        buffer.view(torch.int64).sum()
        return
    sizes = (ctypes.c_int64(n) for n in (buffer.nbytes, torch.get_num_threads(), n_streams))
    library.octavo_machine_read(ctypes.c_void_p(buffer.data_ptr()), *sizes)


def int8_operations_per_second(rounds: int = _ROUNDS) -> float | None:
    """The int8 multiplications and additions that all of PyTorch's threads do on their registers.

    A multiply-add counts as two. The instructions are the best of these that the machine has:
    AVX-512 VNNI, AVX-VNNI, arm64's `sdot`, AVX2 on int16 pairs, or the compiler's own. None
    without the library.

    Args:
        rounds: how long it computes; about 10 ns each.
    """
    library = native.load()
    if library is None:
        return None
    library.octavo_machine_int8.restype = ctypes.c_int64
    arguments = ctypes.c_int64(rounds), ctypes.c_int64(torch.get_num_threads())
    multiply_adds = library.octavo_machine_int8(*arguments)
    return 2 * multiply_adds / best_seconds(lambda: library.octavo_machine_int8(*arguments))
