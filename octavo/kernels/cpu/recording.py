"""Calls of the C++ library, recorded once and made again by one call (`native/replay.cpp`).

Between two calls Python takes longer than it seems: a step reads all weights, which drive its own
code and objects from the caches. On two cores of an AMD EPYC that is a tenth of a decode step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from octavo.kernels.cpu import library as native
from octavo.kernels.cpu.arena import Arena

# What looks at tensors, by its name in PyTorch; `__get__` are attributes, such as their shape.
_VIEWS = frozenset(
    ("__get__", "__getitem__", "__len__", "contiguous", "data_ptr", "dim", "flatten",
     "is_contiguous", "numel", "split", "t", "view")
)  # fmt: skip


class NotRecorded(RuntimeError):
    """Something was computed that is no call of the library."""


class _RecordedCall(ctypes.Structure):
    """`RecordedCall` of native/replay.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("call", ctypes.c_void_p), ("isa", ctypes.c_int64))


class Recording:
    """Calls in their order, with the memory that they write.

    Whatever they read must stay where it was, and is read anew each time.

    Args:
        arena: where the calls' results are, which are valid until a twin of it is used.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._made: list[tuple[int, ctypes.Structure, int]] = []
        self._calls: ctypes.Array[_RecordedCall] | None = None

    def add(self, address: int, call: ctypes.Structure, isa: int) -> None:
        """A call that has been made: where the function is, and its arguments."""
        self._made.append((address, call, isa))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within, what the thread computes is computed and recorded.

        Raises:
            NotRecorded: something was computed by others than the library.
            ArenaFull: there was no memory for it.
        """
        with native.within(self._arena, self.add), _OnlyViews():
            yield
        # Arguments are not copied: `_made` keeps them.
        calls = [_RecordedCall(at, ctypes.addressof(call), isa) for at, call, isa in self._made]
        self._calls = (_RecordedCall * len(calls))(*calls)

    def overwrite(self) -> None:
        """Spoil what the calls wrote, so that a replay has to write it."""
        self._arena.overwrite()

    def replay(self) -> None:
        """Make all calls again."""
        assert self._calls is not None
        native.replay(self._calls)


class _OnlyViews(TorchFunctionMode):
    """Lets PyTorch look at tensors in other ways, and refuses whatever would be computed once.

    (PyTorch's dispatch modes tell views by their schemas, but import 893 modules for the first.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name not in _VIEWS:
            raise NotRecorded(f"{name} is PyTorch's")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and _storage(result) != _storage(args[0]):
            raise NotRecorded(f"{name} copies, as PyTorch's")
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
