"""Calls of the C++ library, recorded once and made again by one call (`native/replay.cpp`).

Between two calls Python takes longer than it seems: a step reads all weights, which drive its own
code and objects from the caches. On two cores of an AMD EPYC that is a tenth of a decode step.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.kernels.cpu import library as native

LINE = 64  # bytes, at which every tensor begins


class NotRecorded(RuntimeError):
    """Something was computed that is no call of the library, or there was no memory for it."""


class Arena:
    """Memory that recordings share, of which one runs at a time.

    Args:
        n_bytes: of memory, which the system gives as it is written.
    """

    def __init__(self, n_bytes: int) -> None:
        self.memory = np.empty(n_bytes, np.uint8)


class Places:
    """Who has which part of an arena: a tensor's is free again once nobody has the tensor."""

    def __init__(self, arena: Arena) -> None:
        self._memory = arena.memory
        skipped = -self._memory.ctypes.data % LINE
        self._free = [(skipped, len(self._memory))]  # start and stop, in order
        self._stop = 0  # after all parts that were ever given

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Whatever the memory holds, in the first place that is large enough.

        Raises:
            NotRecorded: there is none.
        """
        n_bytes = prod(shape) * dtype.itemsize
        size = -(-n_bytes // LINE) * LINE
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[i : i + 1] = [(start + size, stop)] if stop - start > size else []
                break
        else:
            raise NotRecorded(f"{n_bytes} more bytes do not fit in the arena")
        self._stop = max(self._stop, start + size)
        part = self._memory[start : start + n_bytes]
        # A tensor and its views keep the array that they were made of.
        weakref.finalize(part, self._give_back, start, start + size)
        return torch.from_numpy(part).view(dtype).view(tuple(shape))

    def overwrite(self) -> None:
        """Spoil whatever was given, with NaN in any floating-point dtype."""
        self._memory[: self._stop] = 0xFF

    def _give_back(self, start: int, stop: int) -> None:
        merged: list[tuple[int, int]] = []
        for first, last in sorted([*self._free, (start, stop)]):
            if merged and merged[-1][1] == first:
                first = merged.pop()[0]
            merged.append((first, last))
        self._free = merged


class _RecordedCall(ctypes.Structure):
    """`RecordedCall` of native/replay.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("call", ctypes.c_void_p), ("isa", ctypes.c_int64))


class Recording:
    """Calls in their order, with the memory that they write.

    Whatever they read must stay where it was, and is read anew each time.

    Args:
        arena: where the calls' results are; those that are kept are valid until another recording
            of the same arena runs.
    """

    def __init__(self, arena: Arena) -> None:
        self._places = Places(arena)
        self._made: list[tuple[int, ctypes.Structure, int]] = []
        self._calls: ctypes.Array[_RecordedCall] | None = None

    def add(self, address: int, call: ctypes.Structure, isa: int) -> None:
        """As `library.Recorder`."""
        self._made.append((address, call, isa))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `library.Recorder`."""
        return self._places.empty(shape, dtype)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within, what the thread computes is computed and recorded.

        Raises:
            NotRecorded: something was computed by others than the library.
        """
        with native.told_to(self), _OnlyViews():
            yield
        # Arguments are not copied: `_made` keeps them.
        calls = [_RecordedCall(at, ctypes.addressof(call), isa) for at, call, isa in self._made]
        self._calls = (_RecordedCall * len(calls))(*calls)

    def overwrite(self) -> None:
        """Spoil what the calls wrote, so that a replay has to write it."""
        self._places.overwrite()

    def replay(self) -> None:
        """Make all calls again."""
        assert self._calls is not None
        native.replay(self._calls)


class _OnlyViews(TorchDispatchMode):
    """Lets PyTorch look at tensors in other ways, and refuses whatever would be computed once."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        returned = [each.alias_info for each in func._schema.returns]
        if not all(alias is not None and not alias.is_write for alias in returned):
            raise NotRecorded(f"{func} is PyTorch's")
        return func(*args, **(kwargs or {}))
