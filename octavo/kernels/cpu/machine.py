"""The machine's own rates, by the C++ library (`native/machine.cpp`): what kernels are held to."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from octavo.kernels.cpu import library as native
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
    buffer = torch.ones(n_bytes // 8, dtype=torch.int64)  # written, or it would be no memory yet
    library = native.load()
    if library is None:
        return n_bytes / best_seconds(buffer.sum)
    address, threads = ctypes.c_void_p(buffer.data_ptr()), ctypes.c_int64(torch.get_num_threads())
    size = ctypes.c_int64(n_bytes)

    def read(n_streams: int) -> Callable[[], object]:
        return lambda: library.octavo_machine_read(
            address, size, threads, ctypes.c_int64(n_streams)
        )

    return n_bytes / min(best_seconds(read(n_streams)) for n_streams in STREAMS)


def int8_operations_per_second(rounds: int = _ROUNDS) -> float | None:
    """The int8 multiplications and additions that all of PyTorch's threads do on their registers.

    A multiply-add counts as two. The instructions are the best of these that the machine has:
    AVX-512 VNNI, AVX2 on int16 pairs, or the compiler's own. None without the library.

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
